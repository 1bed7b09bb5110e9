"""Rankings against sums made by hand, one pair at a time, and against activation patching."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.methods import by_ruleset, conductance, eap_ig, estimator
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs, induction, ioi
from lens_relevance import RelevanceError, logit_diff, propagate
from tests import models


def random_pairs(n: int = 5, pos: int = 6) -> PromptPairs:
    """Pairs that differ in two positions, each with its own answer."""
    clean = models.random_tokens(n, pos, seed=1)
    corrupt = clean.clone()
    corrupt[:, 2:4] = models.random_tokens(n, 2, seed=2)
    answers = models.random_tokens(n, 1, seed=3)[:, 0]
    return PromptPairs(clean, corrupt, logit_diff(answers, (answers + 7) % models.VOCAB_SIZE))


def by_hand(model: TransformerBridge, pairs: PromptPairs, method: str) -> torch.Tensor:
    """Head scores [pair, layer, head] from one `propagate` per pair."""
    rows = []
    for i in range(len(pairs)):
        pair = pairs[i]
        cache = propagate(model, pair.corrupt, pair.target, rules=method, reference=pair.clean)
        rows.append(-cache.heads().sum(1)[0])
    return torch.stack(rows).double()


def test_mean_error_and_top_share_are_those_of_the_single_pairs(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    ranking = rank_heads(gpt2, pairs, "attnlrp", top_k=3, batch_size=2)
    scores = by_hand(gpt2, pairs, "attnlrp")
    top = torch.stack([row.flatten().abs() >= row.flatten().abs().topk(3).values[-1] for row in scores]).double().mean(0)
    assert list(ranking.columns) == ["layer", "head", "score", "standard_error", "top_share", "top_frequency", "q_value"]
    assert ranking["score"].abs().is_monotonic_decreasing
    for row in ranking.itertuples():
        values = scores[:, row.layer, row.head]
        assert row.score == pytest.approx(float(values.mean()), rel=1e-5)
        assert row.standard_error == pytest.approx(float(values.std() / math.sqrt(len(values))), rel=1e-4)
        assert row.top_share == pytest.approx(float(top[row.layer * 4 + row.head]))


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_batches_do_not_matter(gpt2: TransformerBridge, batch_size: int) -> None:
    pairs = random_pairs()
    whole, parts = rank_heads(gpt2, pairs), rank_heads(gpt2, pairs, batch_size=batch_size)
    both = whole.merge(parts, on=["layer", "head"])
    assert (both["score_x"] - both["score_y"]).abs().max() < 1e-5 * whole["score"].abs().max()
    assert (both["standard_error_x"] - both["standard_error_y"]).abs().max() < 1e-5 * whole["score"].abs().max()


def test_gradient_is_attribution_patching(gpt2: TransformerBridge) -> None:
    """(z_clean - z_corrupt) * dm/dz on the corrupt run, written with plain hooks."""
    pairs = random_pairs()
    seen: dict[str, list[torch.Tensor]] = {"blocks.0.attn.hook_z": [], "blocks.1.attn.hook_z": []}
    gradients: dict[str, torch.Tensor] = {}

    def keep(z: torch.Tensor, hook: object, name: str) -> torch.Tensor:
        z = z.detach().requires_grad_(True) if name.startswith("blocks.0") else z.view_as(z)
        z.retain_grad()
        seen[name].append(z)
        return z

    hooks = [(name, lambda z, hook, name=name: keep(z, hook, name)) for name in seen]
    for tokens in (pairs.clean, pairs.corrupt):
        logits = gpt2.run_with_hooks(tokens, fwd_hooks=hooks)
        if tokens is pairs.corrupt:
            pairs.target.metric(gpt2, tokens, None)(logits).sum().backward()  # type: ignore[union-attr]
            gradients = {name: z[1].grad for name, z in seen.items()}  # type: ignore[misc]
    gpt2.zero_grad()
    expected = torch.stack([((z[0] - z[1]) * gradients[name]).sum((1, 3)).mean(0) for name, z in seen.items()])
    ranking = rank_heads(gpt2, pairs, "gradient").set_index(["layer", "head"])["score"]
    found = torch.tensor([[ranking[layer, head] for head in range(4)] for layer in range(2)])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.float(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_runs(gpt2: TransformerBridge) -> None:
    pairs, relp, deeplift = random_pairs(), estimator("relp"), estimator("deeplift")
    corrupt, clean, both = (relp(gpt2, pairs, ["heads"], run=run)["heads"] for run in ("corrupt", "clean", "both"))  # type: ignore[arg-type]
    assert (corrupt - clean).abs().max() > 1e-3
    torch.testing.assert_close(both, (corrupt + clean) / 2)
    # pair rules are symmetric in the two runs, so that it does not matter on which they are taken
    torch.testing.assert_close(
        deeplift(gpt2, pairs, ["heads"], run="corrupt"), deeplift(gpt2, pairs, ["heads"], run="clean"), rtol=1e-4, atol=1e-5
    )


def test_padding_does_not_matter(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    filler = torch.full((len(pairs), 3), 9)
    mask = torch.cat([torch.ones_like(pairs.clean), torch.zeros_like(filler)], 1)
    padded = PromptPairs(torch.cat([pairs.clean, filler], 1), torch.cat([pairs.corrupt, filler], 1), pairs.target, mask, mask)
    both = rank_heads(gpt2, pairs).merge(rank_heads(gpt2, padded), on=["layer", "head"])
    assert (both["score_x"] - both["score_y"]).abs().max() < 1e-5 * both["score_x"].abs().max()


@pytest.mark.parametrize("build", [models.build_gpt2, models.build_llama])
def test_neurons_are_those_of_the_cache(build: object) -> None:
    model, pairs = build(), random_pairs()  # type: ignore[operator]
    ranking = rank_neurons(model, pairs, "relp", batch_size=2)
    cache = propagate(model, pairs.corrupt, pairs.target, rules="relp", reference=pairs.clean)
    for layer in range(2):
        expected = -cache.neurons(layer).sum(1).mean(0)
        rows = ranking[ranking["layer"] == layer].sort_values("neuron")
        torch.testing.assert_close(torch.tensor(rows["score"].to_numpy()).float(), expected, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_alone(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    before = gpt2(pairs.clean, return_type="logits")
    flags = [p.requires_grad for p in gpt2.parameters()]
    for method in ("deeplift", eap_ig(2), conductance(2), "direct_logit_attribution"):
        rank_heads(gpt2, pairs, method)
    assert [p.requires_grad for p in gpt2.parameters()] == flags
    assert not any(point.fwd_hooks or point.bwd_hooks for point in gpt2.hook_dict.values())
    assert torch.equal(gpt2(pairs.clean, return_type="logits"), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(dict(method="nonsense"), "unknown method 'nonsense'"), (dict(top_k=0), "top_k"), (dict(batch_size=-1), "at least one row")],
)
def test_bad_arguments(gpt2: TransformerBridge, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        rank_heads(gpt2, random_pairs(), **arguments)  # type: ignore[arg-type]


def test_no_pairs(gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="no pairs"):
        rank_heads(gpt2, random_pairs()[:0])


def test_one_pair_has_no_standard_error(gpt2: TransformerBridge) -> None:
    assert rank_heads(gpt2, random_pairs(1))["standard_error"].isna().all()


def test_a_table_of_your_own(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    mine = rank_heads(gpt2, pairs, by_ruleset({}, "mine"))
    assert mine.equals(rank_heads(gpt2, pairs, "gradient"))


def heads_by_both(model: TransformerBridge, pairs: PromptPairs) -> pd.DataFrame:
    """Relevance and the effect of patching, by (layer, head)."""
    patched = activation_patching(model, pairs, "z", direction="mean").to_dataframe().set_index(["layer", "head"])["effect"]
    return rank_heads(model, pairs).set_index(["layer", "head"]).join(patched)


def test_heads_of_ioi_are_those_that_patching_finds(embedded: TransformerBridge) -> None:
    both = heads_by_both(embedded, ioi(embedded, n=32, seed=3))
    assert both["score"].corr(both["effect"]) > 0.97
    assert both.index[0] == both["effect"].abs().idxmax()


def test_heads_of_induction_are_those_that_patching_and_the_head_detector_find(embedded: TransformerBridge) -> None:
    """A head of the first layer that looks one token back, and one of the second that looks behind the token's first occurrence."""
    pairs = induction(embedded, n=16, seed=3)
    both = heads_by_both(embedded, pairs)
    # Heads of one kind stand in for each other, so single patches show less of them than relevance does: the sets agree, not the sizes.
    assert set(both.index[:5]) <= set(both["effect"].abs().nlargest(6).index)
    text = pairs.to_frame(embedded)["clean"].iloc[0]
    previous, inducing = (detect_head(embedded, text, kind) for kind in ("previous_token_head", "induction_head"))
    assert set(both.loc[0].index[:2]) == set(previous[0].topk(2).indices.tolist())
    assert {layer for layer, _ in both.index[:5]} == {0, 1}
    top = both.loc[1].index[0]
    assert inducing[1, top] > 0.25 > 0.1 > inducing[[0, 2, 3]].max()


@pytest.mark.parametrize("rank", [rank_heads, rank_neurons])
def test_prompts_of_unlike_length_stand_side_by_side(rank: Callable[..., pd.DataFrame]) -> None:
    """Scores are the means over single pairs, and batches hold next to no padding; positions stay where they are."""
    model, n, pos = models.build_gpt2(dtype=torch.float64), 12, 6
    clean, corrupt = models.random_tokens(n, pos, seed=0), models.random_tokens(n, pos, seed=1)
    lengths = torch.tensor([6, 3, 4, 6, 3, 5, 4, 3, 6, 5, 3, 4])
    mask = (torch.arange(pos) < lengths[:, None]).long()
    pairs = PromptPairs(clean * mask, corrupt * mask, logit_diff(torch.arange(n), torch.arange(n) + 20), mask, mask)
    sizes: list[int] = []
    handle = model.embed.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0] * output.shape[1]))
    found = rank(model, pairs, "deeplift", batch_size=3)
    handle.remove()
    assert sum(sizes) == 2 * 3 * (3 + 4 + 5 + 6)  # of 2 x 12 x 6: rows of 3 3 3, 3 4 4, 4 5 5, 6 6 6, in two runs
    index = ["layer", found.columns[1]]
    alone = pd.concat([rank(model, pairs[i], "deeplift")[[*index, "score"]] for i in range(n)])
    expected = alone.groupby(index)["score"].mean()
    np.testing.assert_allclose(found.set_index(index)["score"].sort_index(), expected.sort_index(), rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1e-3
    together = rank(model, pairs, "deeplift", batch_size=12)
    np.testing.assert_allclose(together["score"], found["score"], rtol=1e-9)
    assert pairs.by_length().clean_mask.sum(1).tolist() == sorted(lengths.tolist())
    assert [batch.cropped().clean.shape[1] for batch in pairs.by_length().batches(4)] == [3, 5, 6]
    function = replace(pairs, target=lambda logits: logits[:, -1, 0])
    assert function.by_length() is function and function.cropped() is function


def test_pairs_of_one_length_stay_in_their_order() -> None:
    pairs = PromptPairs(models.random_tokens(600, 4, seed=0), models.random_tokens(600, 4, seed=1), logit_diff(1, 2))
    assert pairs.by_length() is pairs and pairs.cropped() is pairs
    mask = torch.ones(600, 4, dtype=torch.long)
    mask[::2, 3] = 0
    ordered = replace(pairs, clean_mask=mask, corrupt_mask=mask).by_length()
    assert ordered.clean_mask.sum(1).tolist() == [3] * 128 + [4] * 128 + [3] * 128 + [4] * 128 + [3] * 44 + [4] * 44
    assert torch.equal(ordered.clean[:3], pairs.clean[[0, 2, 4]]) and torch.equal(ordered.corrupt[-1], pairs.corrupt[-1])
