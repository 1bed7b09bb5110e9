"""Edges: conserved at every writer and reader, equal to TransformerLens's own where it runs, per query head under GQA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, Node, attribution_patch

from analyses.edges import EdgeAttribution, attribute_edges
from lens_relevance import CoverageError, RelevanceError, Rule, Scale, head_flow, log_prob, logit_diff, propagate, random_tokens, rulesets
from lens_relevance.rules import ConstantFirstFactor, PairProduct
from tests import models
from tests.engine.families import RULESETS
from tests.precision import no_upcasts
from tests.rules.test_composition import Damped, Lopsided, LopsidedBetween, LopsidedLinear, OnlyFirst, Wave, WaveBetween
from tests.wider_models import WIDER, build_wider

FAMILIES: dict[str, Callable[..., TransformerBridge]] = {
    "gpt2": models.build_gpt2,
    "neox": models.build_neox,
    "neox_sequential": lambda **k: models.build_neox(parallel=False, **k),
    "llama": models.build_llama,
    "gemma2": models.build_gemma2,
    "olmo2": models.build_olmo2,
    "qwen3": models.build_qwen3,
    **{f"native_{n}": lambda v=v, **k: models.build_native(**v, **k) for n, v in models.NATIVE_VARIANTS.items()},
}
EVERY_RULESET = ("gpt2", "neox", "llama", "gemma2", "olmo2", "qwen3", "native_gqa")
TARGET = logit_diff(3, 4)
REFUSED = {"deepseek_v3": "MLAAttentionBridge"}  # its queries and keys are made from a latent that all heads share


def worst(edges: EdgeAttribution) -> float:
    """The larger error of the two sums over edges, relative to the sum of |edge|."""
    total = edges.scores.abs().sum()
    assert total > 1e-6, "edges of nothing prove nothing"
    at_writers, at_readers = edges.scores.sum(3) - edges.writer_scores, edges.scores.sum(2) - edges.reader_scores
    return float(max(at_writers.abs().max(), at_readers.abs().max()) / total)


@pytest.mark.parametrize("family", FAMILIES)
def test_conserved_at_every_writer_and_reader(family: str) -> None:
    """Pairs, where contributions and coefficients come from two runs, and single prompts, where biases count."""
    model, tokens, other = FAMILIES[family](dtype=torch.float64), models.random_tokens(), models.random_tokens(seed=1)
    with no_upcasts():
        for rules in RULESETS if family in EVERY_RULESET else ("attnlrp", "deeplift"):
            assert worst(attribute_edges(model, tokens, TARGET, rules=rules, reference=other)) < 1e-9, rules
        for rules in ("gradient", "attnlrp", "cp_lrp") if family in EVERY_RULESET else ("gradient",):
            assert worst(attribute_edges(model, tokens, TARGET, rules=rules)) < 1e-9, rules


OWN: dict[str, dict[str, Rule]] = {
    "products": {"scores": Lopsided(), "z": LopsidedLinear(), "soft_cap": Wave()},
    "products between two runs": {"scores": LopsidedBetween(), "z": PairProduct(), "soft_cap": WaveBetween()},
    "one factor": {"scores": ConstantFirstFactor(), "z": OnlyFirst()},
    "scales": {"norm": Scale(0.3), "scores": Scale(1e-6), "z": Scale(0.7), "pattern": Scale(0.2), "soft_cap": Scale(0.4)},
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "qwen3"])
@pytest.mark.parametrize("name", OWN)
def test_rules_of_ones_own_hold_inside_heads(family: str, name: str) -> None:
    """What looks inside heads asks the rules of products for their factors, whoever wrote them."""
    model, tokens, other = FAMILIES[family](dtype=torch.float64), models.random_tokens(), models.random_tokens(seed=1)
    table = {**rulesets()["attnlrp"], **OWN[name]}
    with no_upcasts():
        assert worst(attribute_edges(model, tokens, TARGET, rules=table, reference=other)) < 1e-9
        if "between" not in name:
            assert worst(attribute_edges(model, tokens, TARGET, rules=table)) < 1e-9
        key = {"gpt2": "k.hook_out"}.get(family, "hook_rot_k")
        cache = propagate(model, tokens, TARGET, rules=table, names_filter=f"blocks.1.attn.{key}", reference=other)
        flow = head_flow(model, tokens, TARGET, rules=table, path="key", layers=[1], reference=other)
    expected = cache[f"blocks.1.attn.{key}"].sum(-1)  # [batch, pos, kv_head]
    found = flow[:, 0].sum(-2).unflatten(1, (expected.shape[-1], -1)).sum(2).mT
    assert expected.abs().max() > 1e-9
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10 * float(expected.abs().max()))


def test_a_rule_that_does_not_say_its_factors_is_refused_inside_heads() -> None:
    """Where query heads share keys and values; where none do, no factor is asked for, and such a rule holds as it is."""
    model, tokens = models.build_llama(dtype=torch.float64), models.random_tokens()
    for key in ("scores", "z"):
        with pytest.raises(CoverageError, match=f"blocks.0.attn:{key} needs a ProductRule .*Damped"):
            attribute_edges(model, tokens, TARGET, rules={key: Damped()})
        assert worst(attribute_edges(models.build_gpt2(dtype=torch.float64), tokens, TARGET, rules={key: Damped()})) < 1e-9
    with pytest.raises(RelevanceError, match="blocks.1.attn:scores has Damped"):
        head_flow(model, tokens, TARGET, rules={"scores": Damped()}, path="key", layers=[1])


@pytest.mark.parametrize("family", WIDER)
def test_more_families_are_conserved_or_refused_by_name(family: str) -> None:
    model, tokens, other = build_wider(family), models.random_tokens(), models.random_tokens(seed=1)
    with no_upcasts():
        if family in REFUSED:
            with pytest.raises(CoverageError, match=REFUSED[family]):
                attribute_edges(model, tokens, TARGET, rules="attnlrp")
            return
        for rules, reference in (("gradient", None), ("attnlrp", None), ("deeplift", other)):
            assert worst(attribute_edges(model, tokens, TARGET, rules=rules, reference=reference)) < 1e-9, rules


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "qwen3", "native_gqa"])
@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_conserved_in_single_precision(family: str, rules: str) -> None:
    model, other = FAMILIES[family](), models.random_tokens(seed=1)
    assert (
        worst(attribute_edges(model, models.random_tokens(), TARGET, rules=rules, reference=other if rules == "deeplift" else None)) < 1e-5
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "neox"])
def test_what_enters_the_readers_is_what_autograd_delivers_below_the_norm(family: str) -> None:
    """The coefficients of all readers of a norm were pulled through it by us; their sum is what the engine's own backward gave."""
    model, tokens = FAMILIES[family](dtype=torch.float64), models.random_tokens()
    with no_upcasts():
        edges = attribute_edges(model, tokens, TARGET, rules="attnlrp")
        names = ["blocks.1.ln1.hook_in", "blocks.1.ln2.hook_in", "blocks.1.hook_out"]
        cache = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=names)
    reads = [i for i, name in enumerate(edges.readers) if name.startswith("L1H")]
    assert torch.allclose(edges.reader_scores[:, :, reads].sum(-1), cache[names[0]].sum(-1), atol=1e-12)
    assert torch.allclose(edges.reader_scores[:, :, edges.readers.index("L1.mlp.in")], cache[names[1]].sum(-1), atol=1e-12)
    assert torch.allclose(edges.reader_scores[:, :, -1], cache[names[2]].sum(-1), atol=1e-12)


def test_what_enters_q_is_its_relevance_less_the_shares_of_bias_and_beta() -> None:
    model, tokens = models.build_gpt2(dtype=torch.float64), models.random_tokens()
    edges = attribute_edges(model, tokens, TARGET, rules="attnlrp")
    cache = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=["blocks.1.attn.q.hook_out"])
    coefficient = cache.coefficients["blocks.1.attn.q.hook_out"]
    q, beta = model.blocks[1].attn.q.original_component, model.blocks[1].ln1.original_component.bias
    weight = q.weight if q.weight.shape[0] == 16 and not type(q).__name__ == "Conv1D" else q.weight.T
    constant = (q.bias + weight @ beta).unflatten(0, (4, 4)).detach()
    expected = cache["blocks.1.attn.q.hook_out"].sum(-1) - (coefficient * constant).sum(-1)
    heads = [edges.readers.index(f"L1H{h}.q") for h in range(4)]
    assert expected.abs().max() > 1e-4
    assert torch.allclose(edges.reader_scores[:, :, heads], expected, atol=1e-12)


def test_scores_of_heads_and_mlps_are_those_of_the_cache() -> None:
    for family in ("gpt2", "llama", "gemma2", "olmo2"):
        model, tokens, other = FAMILIES[family](dtype=torch.float64), models.random_tokens(), models.random_tokens(seed=1)
        with no_upcasts():
            edges = attribute_edges(model, tokens, TARGET, rules="deeplift", reference=other)
            cache = propagate(model, tokens, TARGET, rules="deeplift", reference=other)
        for layer in range(2):
            for head in range(4):
                mine = edges.writer_scores[:, :, edges.writers.index(f"L{layer}H{head}")]
                assert torch.allclose(mine, cache.heads()[:, :, layer, head], atol=1e-12), family
            mlp = edges.writer_scores[:, :, edges.writers.index(f"L{layer}.mlp")]
            assert torch.allclose(mlp, cache.neurons(layer).sum(-1), atol=1e-12), family


def _name(node: Node) -> str:
    kinds = {"embed": "embed", "mlp_out": f"L{node.layer}.mlp", "mlp_in": f"L{node.layer}.mlp.in", "logits": "logits"}
    head = f"L{node.layer}H{node.head}"
    return kinds.get(node.kind) or (head if node.kind == "attn_head_out" else f"{head}.{node.kind[0]}")


def in_transformer_lens(model: Any, clean: Tensor, corrupt: Tensor) -> dict[tuple[int, str, str], float]:
    """TransformerLens's own edges, by position and our names."""
    result = attribution_patch(model, clean, corrupt, lambda x: x[0, -1, 3] - x[0, -1, 4], EdgeAttributionConfig(granularity="edge"))
    return {(u.position, _name(u), _name(v)): score for (u, v), score in result.edge_scores.items()}


@pytest.mark.parametrize("family", ["gpt2", "neox", "neox_sequential"])
def test_equals_transformer_lens_under_gradient(family: str) -> None:
    model = FAMILIES[family](dtype=torch.float64)
    clean, corrupt = models.random_tokens(1), models.random_tokens(1, seed=1)
    theirs = in_transformer_lens(model, clean, corrupt)
    edges = attribute_edges(model, corrupt, TARGET, rules="gradient", reference=clean)
    ours = {
        (row.position, row.source, row.target): -row.score
        for row in edges.to_frame().itertuples()
        if row.source not in ("bias", "pos_embed")
    }
    assert ours.keys() == theirs.keys()
    scale = max(map(abs, theirs.values()))
    assert scale > 1e-3 and max(abs(ours[k] - theirs[k]) for k in theirs) < 1e-5 * scale


def test_batches_and_padding_change_nothing() -> None:
    model, tokens = models.build_llama(), models.random_tokens(2, 6)
    alone = attribute_edges(model, tokens[:1, :4], TARGET, rules="attnlrp")
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    together = attribute_edges(model, tokens, TARGET, rules="attnlrp", attention_mask=mask)
    assert torch.allclose(together.scores[0, :4], alone.scores[0], atol=1e-5)
    assert not together.scores[0, 4:].any()


def test_several_references_are_averaged() -> None:
    model, tokens = models.build_gpt2(dtype=torch.float64), models.random_tokens(1)
    edges = attribute_edges(model, tokens, TARGET, rules="deeplift", reference=random_tokens(3, seed=5))
    cache = propagate(model, tokens, TARGET, rules="deeplift", reference=random_tokens(3, seed=5))
    assert worst(edges) < 1e-9
    assert torch.allclose(edges.writer_scores[:, :, edges.writers.index("L1H2")], cache.heads()[:, :, 1, 2], atol=1e-12)


@pytest.mark.parametrize(
    ("family", "n"), [("gpt2", 36 + 7 + 96 + 12 + 13), ("neox", 24 + 2 + 84 + 7 + 12), ("neox_sequential", 24 + 6 + 84 + 11 + 12)]
)
def test_a_reader_reads_what_was_written_before_it(family: str, n: int) -> None:
    """Two layers of four heads: q, k, v of every head, then the MLP, then the next layer, then the logits."""
    edges = attribute_edges(FAMILIES[family](dtype=torch.float64), models.random_tokens(), TARGET, rules="attnlrp")
    assert edges.n_edges == n
    assert not edges.scores[:, :, ~edges.exists].any()
    exists = {(w, r) for w, row in zip(edges.writers, edges.exists, strict=True) for r, e in zip(edges.readers, row, strict=True) if e}
    assert ("embed", "L0H0.q") in exists and ("L0H3", "L1H2.k") in exists and ("L1.mlp", "logits") in exists
    assert ("L0H0", "L0H1.q") not in exists and ("L1.mlp", "L1.mlp.in") not in exists
    assert (("L1H0", "L1.mlp.in") in exists) == (family != "neox")


def test_the_table_of_edges_is_strongest_first() -> None:
    edges = attribute_edges(models.build_gpt2(dtype=torch.float64), models.random_tokens(), TARGET, rules="attnlrp")
    frame = edges.to_frame(1)
    assert len(frame) == 6 * edges.n_edges and frame["score"].abs().is_monotonic_decreasing and frame["score"].nunique() > 100
    for row in frame.head(20).itertuples():
        assert row.score == edges.scores[1, row.position, edges.writers.index(row.source), edges.readers.index(row.target)]


def test_target_that_is_not_linear() -> None:
    model, tokens = models.build_gpt2(dtype=torch.float64), models.random_tokens()
    assert worst(attribute_edges(model, tokens, log_prob(3), rules="deeplift", reference=models.random_tokens(seed=1))) < 1e-9


def test_model_is_left_as_it_was() -> None:
    model, tokens = models.build_llama(), models.random_tokens()
    before = model(tokens)
    attribute_edges(model, tokens, TARGET, rules="attnlrp")
    assert all(not p._forward_hooks for p in model.hook_dict.values()) and torch.equal(model(tokens), before)
    with pytest.raises(RelevanceError):
        attribute_edges(model, tokens, TARGET, rules="deeplift", reference=tokens[:, 1:])
    assert all(p.requires_grad for p in model.original_model.parameters())
    assert all(not p._forward_hooks for p in model.hook_dict.values())


def test_a_stream_that_is_not_a_sum_is_refused() -> None:
    """A hook that changes the stream between two writes makes edges meaningless."""
    model, tokens = models.build_gpt2(), models.random_tokens()
    with model.hooks(fwd_hooks=[("blocks.1.hook_in", lambda x, hook: x * 2)]), pytest.raises(RelevanceError, match="not the sum"):
        attribute_edges(model, tokens, TARGET, rules="attnlrp")
