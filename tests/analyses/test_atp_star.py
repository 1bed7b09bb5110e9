"""AtP*'s correction: against attention recomputed by hand, and against patching where it must be exact or where the gradient is blind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads
from analyses.methods import atp_star, estimator
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs
from lens_relevance import propagate
from tests import models
from tests.analyses.known_circuits import saturated_softmax
from tests.analyses.test_ranking import random_pairs


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """z [batch, pos, head, d_head] of causal attention, from q [batch, pos, head, d_head] and as many or fewer keys and values."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    masked = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", masked.softmax(-1), v)


@pytest.mark.parametrize(
    ("build", "queries", "keys"),
    [(models.build_gpt2, "hook_q", "hook_k"), (models.build_llama, "hook_rot_q", "hook_rot_k")],
    ids=["gpt2", "llama"],
)
@pytest.mark.parametrize("run", ["corrupt", "clean"])
def test_the_output_of_a_head_is_recomputed(build: Callable[..., TransformerBridge], queries: str, keys: str, run: str) -> None:
    """Sum of (z' - z) * g_z, z' by the textbook's formula; keys of Llama's groups count for all their queries."""
    model, pairs = build(dtype=torch.float64), random_pairs()
    (_, clean), (_, corrupt) = (model.run_with_cache(tokens) for tokens in (pairs.clean, pairs.corrupt))
    here, other, tokens, sign = (corrupt, clean, pairs.corrupt, 1) if run == "corrupt" else (clean, corrupt, pairs.clean, -1)
    g = propagate(model, tokens, pairs.target, rules="gradient", names_filter=lambda name: name.endswith("o.hook_in")).coefficients
    found = atp_star()(model, pairs, ["q", "k"], run=run)  # type: ignore[arg-type]
    for layer in range(2):
        q, k, v, other_q, other_k = (
            cache[f"blocks.{layer}.attn.{point}"]
            for cache, point in ((here, queries), (here, keys), (here, "hook_v"), (other, queries), (other, keys))
        )
        new = {"q": attention(other_q, k, v), "k": attention(q, other_k, v)}
        for component, z in new.items():
            effect = ((z - attention(q, k, v)) * g[f"blocks.{layer}.attn.o.hook_in"]).sum((1, 3))
            expected = sign * effect.unflatten(1, (found[component].shape[2], -1)).sum(2)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found[component][:, layer], expected, rtol=1e-5, atol=1e-7)  # Llama's softmax is fp32


def test_exact_where_nothing_but_the_softmax_is_curved() -> None:
    """One layer of attention, no norm: what lies above z is linear."""
    model, pairs = models.build_native(torch.float64, n_layers=1, attn_only=True, normalization_type=None), random_pairs()
    pairs = PromptPairs(pairs.clean, pairs.corrupt.flip(1), pairs.target)  # the last token asks, and has to differ
    patched = activation_patching(model, pairs, ("q", "k", "v")).effect.T.unflatten(1, (3, 1, -1))
    found = atp_star()(model, pairs, ["q", "k", "v"])
    plain = estimator("gradient")(model, pairs, ["q", "k"])
    for i, component in enumerate("qkv"):
        torch.testing.assert_close(found[component], patched[:, i], rtol=1e-9, atol=1e-11)
    assert all((found[component] - plain[component]).abs().max() > 1e-2 for component in plain)


def test_a_saturated_softmax_hides_queries_from_the_gradient_alone() -> None:
    known = saturated_softmax()
    plain, corrected = (rank_heads(known.model, known.pairs, method, component="q") for method in ("gradient", "atp_star"))
    assert plain["score"].abs().max() < 1e-6
    assert corrected[["layer", "head"]].iloc[0].tolist() == [0, 0]
    effect = activation_patching(known.model, known.pairs, "q").grid("q").loc[0, 0]
    assert corrected["score"][0] == pytest.approx(effect, rel=1e-4)  # nothing above the head is curved


def test_other_components_get_attribution_patching(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    found, plain = (estimator(method)(gpt2, pairs, ["resid", "k", "heads", "v"]) for method in ("atp_star", "gradient"))
    assert list(found) == ["resid", "k", "heads", "v"] and not torch.allclose(found["k"], plain["k"], atol=1e-3)
    for component in ("resid", "heads", "v"):
        assert torch.equal(found[component], plain[component])


def test_padding_does_not_matter_and_the_model_is_left_alone(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    filler = torch.full((len(pairs), 3), 9)
    mask = torch.cat([torch.ones_like(pairs.clean), torch.zeros_like(filler)], 1)
    padded = PromptPairs(torch.cat([pairs.clean, filler], 1), torch.cat([pairs.corrupt, filler], 1), pairs.target, mask, mask)
    one, two = (atp_star()(gpt2, given, ["q", "k"]) for given in (pairs, padded))
    for component in one:
        torch.testing.assert_close(one[component], two[component], rtol=1e-4, atol=1e-5)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in gpt2.hook_dict.values())


def test_queries_and_keys_beside_the_heads(gpt2: TransformerBridge) -> None:
    table = compare_with_patching(
        gpt2, random_pairs(8), ["atp_star", "gradient"], components=["heads", "q", "k"], direction="denoising", resamples=0
    )
    pearson = table.pivot(index="method", columns="component", values="pearson")
    assert pearson.loc["atp_star", "heads"] == pearson.loc["gradient", "heads"]
    assert pearson.loc["atp_star", "k"] > pearson.loc["gradient", "k"] + 0.05
    assert set(table.loc[table["method"] == "atp_star", "forwards"]) == {4}
