"""What a component does: its flow, its pattern scores, what it writes, where it fires; each against figures made another way."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
import torch
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge

from analyses.describe import describe_head, describe_neuron
from analyses.describe.attention_patterns import pattern_scores
from analyses.describe.direct_logits import DirectLogits
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.tasks import PromptPairs, induction, ioi
from lens_relevance import CoverageError, RelevanceError, logit, propagate
from lens_relevance.attention_methods import head_flow
from tests import models
from tests.analyses.test_ranking import random_pairs
from tests.wider_models import build_wider

PROMPT = "When Mary and John went to the store, John gave a drink to"


def scores_of(frame: pd.DataFrame, kind: str) -> torch.Tensor:
    """A column of `pattern_scores` as [layer, head]."""
    return torch.tensor(frame.pivot(index="layer", columns="head", values=kind).to_numpy())


def test_pattern_scores_are_those_of_the_head_detector(embedded: TransformerBridge) -> None:
    texts = [PROMPT, "Mary gave John a book and Mary gave John a key"]
    found = pattern_scores(embedded, texts)  # of two lengths, so that padding has to be left out
    for kind, name in (
        ("previous_token", "previous_token_head"),
        ("duplicate_token", "duplicate_token_head"),
        ("induction", "induction_head"),
    ):
        expected = detect_head(embedded, texts, name)  # type: ignore[arg-type]
        assert expected.max() > 0.01
        torch.testing.assert_close(scores_of(found, kind).float(), expected, rtol=1e-4, atol=1e-6)


def test_the_top_heads_of_induction_are_those_that_pattern_scores_single_out(embedded: TransformerBridge) -> None:
    """Heads of the first layer that look at the token before, heads of the second that look behind an earlier occurrence; no others."""
    pairs = induction(embedded, n=32, seed=5)
    scores = pattern_scores(embedded, pairs).set_index(["layer", "head"])
    # a third of the queries (8 of 25) have an earlier occurrence to look behind, so that no head can have an induction score over 0.32
    previous, inducing = (set(scores.index[scores[kind] > least]) for kind, least in (("previous_token", 0.5), ("induction", 0.2)))
    assert len(previous) >= 2 and len(inducing) >= 2 and not previous & inducing
    assert {layer for layer, _ in previous} == {0} and {layer for layer, _ in inducing} == {1}
    whole = previous | inducing
    assert {(row.layer, row.head) for row in rank_heads(embedded, pairs).head(len(whole)).itertuples()} == whole
    ranked = [(row.layer, row.head) for row in rank_heads(embedded, pairs, "deeplift").itertuples()]
    assert set(ranked[: len(whole)]) == whole
    assert set(ranked[:2]) == previous


def test_an_induction_head_looks_behind_the_repetition_and_copies(embedded: TransformerBridge) -> None:
    pairs = induction(embedded, n=16, seed=5)
    top = max(range(4), key=lambda h: describe_head(embedded, pairs, 1, head=h).pattern_scores["induction"])
    found = describe_head(embedded, pairs, 1, head=top)
    here = found.arcs[found.arcs["attention"] > found.arcs["reference_attention"]]
    assert len(here) > 2
    # the last token, and what followed its first occurrence: BOS x1 ... A B
    assert (here["destination_position"] == 24).all() and (here["source_position"] == 9).all() and (here["relevance"] > 0).all()
    answers = pairs.to_frame(embedded)["answer"]
    assert all(row.source == answers[row.example] for row in here.itertuples())
    ranks = found.writes.drop_duplicates("source")["own_rank"]
    assert ranks.median() == 1  # of 247 words, mostly the one that is attended to
    first = found.writes.iloc[0]
    assert first["effect"] == "promotes" and first["rank"] == 1


@pytest.mark.parametrize("build", [models.build_gpt2, models.build_llama, models.build_gemma2])
def test_a_heads_flow_adds_up_to_its_rank(build: Callable[[], TransformerBridge]) -> None:
    model, pairs = build(), random_pairs()
    ranked = rank_heads(model, pairs, "deeplift").set_index(["layer", "head"])["score"]
    for layer, head in ((0, 1), (1, 3)):
        found = describe_head(model, pairs, layer, head=head, top_k=10_000)
        assert found.relevance == pytest.approx(ranked[layer, head], rel=1e-4, abs=1e-6)
        assert found.token_pairs["relevance"].sum() == pytest.approx(found.relevance, rel=1e-4, abs=1e-6)
        assert found.arcs["relevance"].sum() == pytest.approx(found.relevance * len(pairs), rel=1e-4, abs=1e-6)
        _, cache = model.run_with_cache(pairs.clean)
        assert found.token_pairs["occurrences"].sum() == int((cache[f"blocks.{layer}.attn.hook_pattern"][:, head] > 0).sum())
        assert found.arcs["relevance"].abs().is_monotonic_decreasing


def test_arcs_are_those_of_head_flow(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    flow = head_flow(gpt2, pairs.clean, pairs.target, reference=pairs.corrupt)[:, 1, 2]
    _, cache = gpt2.run_with_cache(pairs.clean)
    first = describe_head(gpt2, pairs, 1, head=2, top_k=3).arcs.iloc[0]
    at = (first["example"], first["destination_position"], first["source_position"])
    assert flow.abs().max() > 1e-3 and abs(first["relevance"]) == pytest.approx(float(flow.abs().max()))
    assert first["relevance"] == pytest.approx(float(flow[at]))
    assert first["attention"] == pytest.approx(float(cache["blocks.1.attn.hook_pattern"][at[0], 2, at[1], at[2]]))
    # without a tokenizer, tokens are their ids
    assert first["source"] == str(int(pairs.clean[at[0], at[2]])) and first["destination"] == str(int(pairs.clean[at[0], at[1]]))


def test_prompts_without_a_counterpart_and_padding(gpt2: TransformerBridge) -> None:
    tokens = models.random_tokens(3)
    alone = describe_head(gpt2, tokens, 0, head=1, target=logit(torch.tensor([1, 2, 3])), top_k=4)
    cache = propagate(gpt2, tokens, logit(torch.tensor([1, 2, 3])), rules="attnlrp")
    assert alone.relevance == pytest.approx(float(cache.heads()[:, :, 0, 1].sum(1).mean()), rel=1e-4)
    assert "reference_attention" not in alone.arcs
    filler, ones = torch.full((3, 2), 9), torch.ones_like(tokens)
    mask = torch.cat([ones, torch.zeros_like(filler)], 1)
    pairs = PromptPairs(tokens, models.random_tokens(3, seed=7), logit(torch.tensor([1, 2, 3])))
    wide = [torch.cat([part, filler], 1) for part in (pairs.clean, pairs.corrupt)]
    padded = describe_head(gpt2, PromptPairs(wide[0], wide[1], pairs.target, mask, mask), 0, head=1, top_k=4)
    pd.testing.assert_frame_equal(padded.arcs, describe_head(gpt2, pairs, 0, head=1, top_k=4).arcs, rtol=1e-3)


def test_many_prompts_go_in_batches(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(7)
    whole = describe_head(gpt2, pairs, 1, head=0, top_k=5), describe_neuron(gpt2, pairs, 1, neuron=5, top_k=5)
    monkeypatch.setattr("analyses.datasets.batches._TOKENS_PER_PASS", 12)
    parts = describe_head(gpt2, pairs, 1, head=0, top_k=5), describe_neuron(gpt2, pairs, 1, neuron=5, top_k=5)
    for name in ("arcs", "token_pairs", "writes"):
        pd.testing.assert_frame_equal(getattr(whole[0], name), getattr(parts[0], name), rtol=1e-3, atol=1e-6)
    for name in ("contexts", "writes"):
        pd.testing.assert_frame_equal(getattr(whole[1], name), getattr(parts[1], name), rtol=1e-3, atol=1e-6)


def test_a_head_writes_its_values_through_the_final_norm_and_the_unembedding() -> None:
    """By hand on a Llama, where heads 2 and 3 share the second of two value heads."""
    model, tokens = models.build_llama(torch.float64), models.random_tokens(2)
    found = describe_head(model, tokens, 1, head=2, target=logit(3), top_k=1)
    arc = found.arcs.iloc[0]
    logits, cache = model.run_with_cache(tokens)
    v = cache["blocks.1.attn.hook_v"][arc["example"], arc["source_position"], 1]
    final = cache["blocks.1.hook_resid_post"][arc["example"], arc["destination_position"]]
    hf = model.original_model.model
    norm = final.pow(2).mean().add(hf.norm.variance_epsilon).sqrt()
    written = hf.layers[1].self_attn.o_proj.weight[:, 8:12] @ v
    expected = model.original_model.lm_head.weight @ (written * hf.norm.weight / norm)
    expected = (expected - expected.mean()).detach()
    top = found.writes[found.writes["effect"] == "promotes"]
    assert top["token"].tolist() == [str(i) for i in expected.topk(5).indices.tolist()]
    torch.testing.assert_close(torch.tensor(top["logit"].to_numpy()), expected.topk(5).values, rtol=1e-5, atol=1e-6)
    low = found.writes[found.writes["effect"] == "suppresses"]
    torch.testing.assert_close(torch.tensor(low["logit"].to_numpy()), (-(-expected).topk(5).values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", [models.build_gpt2, models.build_llama, models.build_gemma2, models.build_olmo2])
@pytest.mark.parametrize("component", ["attn", "mlp"])
def test_direct_logits_of_all_that_was_written_are_the_logits(build: Callable[..., TransformerBridge], component: str) -> None:
    """All that the sublayer of the last layer writes and the rest of the residual together make the logits, biases aside."""
    model, tokens = build(torch.float64), models.random_tokens(1)
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    direct = DirectLogits(model, 1, component)
    seen, cut = {}, ("unembed.hook_out", "ln_final.hook_in")
    _, cache = model.run_with_cache(tokens, names_filter=[*direct.norms, *cut])
    seen = {name: cache[name][0] for name in direct.norms}
    final = cache["ln_final.hook_in"][0]
    post = [name for name in direct.norms if "post" in name]
    assert bool(post) == (build in (models.build_gemma2, models.build_olmo2))
    rest = DirectLogits(model, 5, component)  # no layer 5, so no norm but the final one
    if post:
        _, after = model.run_with_cache(tokens, names_filter=post[0].replace("hook_in", "hook_out"))
        sublayer = next(iter(after.values()))[0]
        total = direct(seen[post[0]], seen) + rest(final - sublayer, {"ln_final.hook_in": final})
    else:
        total = direct(final, seen)
    logits = cache["unembed.hook_out"][0]
    torch.testing.assert_close(total, logits - logits.mean(-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_a_neurons_description(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    ranked = rank_neurons(gpt2, pairs, "deeplift")
    layer, neuron = int(ranked["layer"][0]), int(ranked["neuron"][0])
    found = describe_neuron(gpt2, pairs, layer, neuron=neuron, top_k=4)
    assert found.relevance == pytest.approx(float(ranked["score"][0]), rel=1e-4)
    cache = propagate(gpt2, pairs.clean, pairs.target, reference=pairs.corrupt)
    relevance = cache.neurons(layer)[..., neuron]
    first = found.contexts.iloc[0]
    assert abs(first["relevance"]) == pytest.approx(float(relevance.abs().max()), rel=1e-5)
    where = (first["example"], first["position"])
    activations = [gpt2.run_with_cache(part)[1][f"blocks.{layer}.mlp.hook_post"][*where, neuron] for part in (pairs.clean, pairs.corrupt)]
    assert [first["activation"], first["reference"]] == pytest.approx([float(a) for a in activations], rel=1e-4)
    assert f"«{int(pairs.clean[where])}»" in first["context"]
    by_activation = describe_neuron(gpt2, pairs, layer, neuron=neuron, by="activation").contexts["activation"].abs()
    assert by_activation.is_monotonic_decreasing
    assert by_activation[0] == pytest.approx(
        float(gpt2.run_with_cache(pairs.clean)[1][f"blocks.{layer}.mlp.hook_post"][..., neuron].abs().max())
    )
    # the order of what it writes does not depend on the norm's scale
    hf = gpt2.original_model
    written = hf.transformer.h[layer].mlp.c_proj.weight[neuron]
    logits = hf.lm_head.weight @ ((written - written.mean()) * hf.transformer.ln_f.weight)
    assert found.writes["token"].tolist()[:5] == [str(i) for i in logits.topk(5).indices.tolist()]
    assert found.writes["token"].tolist()[5:] == [str(i) for i in (-logits).topk(5).indices.tolist()]


def test_descriptions_turn_into_rows_beside_the_rank(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, n=8)
    top = rank_heads(embedded, pairs, "deeplift").head(2)
    rows = pd.concat(
        [describe_head(embedded, pairs, row.layer, head=row.head).to_dataframe() for row in top.itertuples()], ignore_index=True
    )
    assert rows[["layer", "head"]].equals(top[["layer", "head"]])
    assert (rows["relevance"] - top["score"]).abs().max() < 1e-3
    assert rows["destination"].notna().all() and (rows["promotes"].str.split().str.len() == 5).all()
    row = describe_neuron(embedded, pairs, 0, neuron=3).to_dataframe()
    assert len(row) == 1 and f"«{row['token'][0].strip()}»" in row["context"][0]


def test_the_model_is_left_alone(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    before, flags = gpt2(pairs.clean, return_type="logits"), [p.requires_grad for p in gpt2.parameters()]
    describe_head(gpt2, pairs, 0, head=0)
    describe_neuron(gpt2, pairs, 0, neuron=0)
    assert [p.requires_grad for p in gpt2.parameters()] == flags
    assert not any(point.fwd_hooks or point.bwd_hooks for point in gpt2.hook_dict.values())
    assert torch.equal(gpt2(pairs.clean, return_type="logits"), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layer=2, head=0), "layer 2 is out of range"),
        (dict(layer=0, head=4), "head 4 is out of range"),
        (dict(layer=0, neuron=64), "neuron 64 is out of range"),
        (dict(layer=-1, neuron=0), "layer -1 is out of range"),
        (dict(layer=0, head=0, top_k=0), "top_k"),
        (dict(layer=0, neuron=0, top_k=0), "top_k"),
        (dict(layer=0, head=0, target=logit(0)), "bring their own target"),
    ],
)
def test_bad_arguments(gpt2: TransformerBridge, arguments: dict[str, object], message: str) -> None:
    describe = describe_head if "head" in arguments else describe_neuron
    with pytest.raises(RelevanceError, match=message):
        describe(gpt2, random_pairs(), **arguments)  # type: ignore[operator]


def test_no_prompts(gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="no prompts"):
        describe_head(gpt2, random_pairs()[:0], 0, head=0)


def test_models_on_which_it_cannot_be_told() -> None:
    tokens = models.random_tokens(2)
    assert len(describe_head(build_wider("opt", torch.float32), tokens, 0, head=0).arcs) > 0  # its pattern is rebuilt
    with pytest.raises(CoverageError, match="output head is not linear"):
        describe_neuron(build_wider("bert", torch.float32), tokens, 0, neuron=0)
