"""AtP*: against attention recomputed and layers dropped by hand, and against patching where it must be exact or the gradient is blind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads
from analyses.methods import atp_star, estimator
from analyses.methods.atp_star_method import without_cancellation
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs
from tests import models
from tests.analyses.known_circuits import saturated_softmax
from tests.analyses.test_ranking import random_pairs

N_LAYERS = 3


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """z [batch, pos, head, d_head] of causal attention, from q [batch, pos, head, d_head] and as many or fewer keys and values."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    masked = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", masked.softmax(-1), v)


def gradients_without(model: TransformerBridge, tokens: Tensor, pairs: PromptPairs, layer: int, names: list[str]) -> dict[str, Tensor]:
    """Gradients at HookPoints, by plain autograd, with what attention and MLP of a layer write detached."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, hook: Any) -> Tensor:
        seen[name] = x.clone()
        seen[name].retain_grad()
        return seen[name]

    hooks: list[Any] = [(name, partial(keep, name)) for name in names]
    hooks += [(f"blocks.{layer}.{point}", lambda x, hook: x.detach()) for point in ("hook_attn_out", "hook_mlp_out")]
    pairs.metric(model)(model.run_with_hooks(tokens, fwd_hooks=hooks)).sum().backward()
    model.zero_grad()
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in seen.items()}


def averaged(estimates: list[Tensor]) -> Tensor:
    """Mean magnitude with the sign of the sum."""
    total = sum(estimates[1:], estimates[0])
    return sum((x.abs() for x in estimates), torch.zeros_like(total)) / len(estimates) * torch.where(total < 0, -1.0, 1.0)


@pytest.mark.parametrize(
    ("build", "queries", "keys"),
    [
        (partial(models.build_gpt2, n_layer=N_LAYERS), "hook_q", "hook_k"),
        (partial(models.build_llama, num_hidden_layers=N_LAYERS), "hook_rot_q", "hook_rot_k"),
    ],
    ids=["gpt2", "llama"],
)
@pytest.mark.parametrize("run", ["corrupt", "clean"])
def test_outputs_of_heads_are_recomputed_and_layers_dropped(
    build: Callable[..., TransformerBridge], queries: str, keys: str, run: str
) -> None:
    """Mean over the other layers of |sum of (z' - z) * g_z|, z' by the textbook's formula; Llama's keys count for all their queries."""
    model, pairs = build(dtype=torch.float64), random_pairs()
    (_, clean), (_, corrupt) = (model.run_with_cache(tokens) for tokens in (pairs.clean, pairs.corrupt))
    here, other, tokens, sign = (corrupt, clean, pairs.corrupt, 1) if run == "corrupt" else (clean, corrupt, pairs.clean, -1)
    z_names = [f"blocks.{i}.attn.hook_z" for i in range(N_LAYERS)]
    g = [gradients_without(model, tokens, pairs, dropped, z_names) for dropped in range(N_LAYERS)]
    found = atp_star()(model, pairs, ["q", "k"], run=run)  # type: ignore[arg-type]
    for layer in range(N_LAYERS):
        q, k, v, other_q, other_k = (
            cache[f"blocks.{layer}.attn.{point}"]
            for cache, point in ((here, queries), (here, keys), (here, "hook_v"), (other, queries), (other, keys))
        )
        new = {"q": attention(other_q, k, v), "k": attention(q, other_k, v)}
        for component, z in new.items():
            estimates = []
            for dropped in range(N_LAYERS):
                effect = ((z - attention(q, k, v)) * g[dropped][z_names[layer]]).sum((1, 3))
                effect = sign * effect.unflatten(1, (found[component].shape[2], -1)).sum(2)
                if dropped == layer:
                    assert (effect == 0).all()
                else:
                    estimates.append(effect)
            expected = averaged(estimates)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(found[component][:, layer], expected, rtol=1e-5, atol=1e-7)  # Llama's softmax is fp32


def test_layers_are_dropped_for_every_component() -> None:
    model, pairs = models.build_gpt2(torch.float64, n_layer=N_LAYERS), random_pairs()
    points = {"resid": "hook_resid_pre", "attn": "hook_attn_out", "mlp": "hook_mlp_out", "heads": "attn.hook_z", "v": "attn.hook_v"}
    found, plain = (estimator(method)(model, pairs, list(points)) for method in ("atp_star", "gradient"))
    (_, clean), (_, corrupt) = (model.run_with_cache(tokens) for tokens in (pairs.clean, pairs.corrupt))
    for component, point in points.items():
        names = [f"blocks.{i}.{point}" for i in range(N_LAYERS)]
        g = [gradients_without(model, pairs.corrupt, pairs, dropped, names) for dropped in range(N_LAYERS)]
        for layer, name in enumerate(names):
            dropped_layers = [i for i in range(N_LAYERS) if component == "resid" or i != layer]
            effects = [(clean[name] - corrupt[name]) * g[i][name] for i in dropped_layers]
            expected = averaged([effect.sum((1, 3) if effect.ndim == 4 else 2) for effect in effects])
            torch.testing.assert_close(found[component][:, layer], expected, rtol=1e-9, atol=1e-11)
        assert (found[component] - plain[component]).abs().max() > 0.05 * plain[component].abs().max()


def test_paths_that_cancel_are_seen_with_one_of_them_dropped() -> None:
    """The first layer's effect is 1 directly and -1 through the second: 0 in the gradient, as in the pass that drops the third."""
    estimates = torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 3, 1)
    assert without_cancellation(estimates, "mlp")[0, 0] == pytest.approx(0.5)
    assert without_cancellation(-estimates, "resid")[0, 0] == pytest.approx(-1 / 3)
    assert without_cancellation(estimates[:1] - 2, "mlp").tolist() == [[[-2.0], [-2.0], [-2.0]]]  # one layer: nothing to drop


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


def test_padding_does_not_matter_and_the_model_is_left_alone(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    filler = torch.full((len(pairs), 3), 9)
    mask = torch.cat([torch.ones_like(pairs.clean), torch.zeros_like(filler)], 1)
    padded = PromptPairs(torch.cat([pairs.clean, filler], 1), torch.cat([pairs.corrupt, filler], 1), pairs.target, mask, mask)
    one, two = (atp_star()(gpt2, given, ["q", "k"]) for given in (pairs, padded))
    for component in one:
        torch.testing.assert_close(one[component], two[component], rtol=1e-4, atol=1e-5)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in gpt2.hook_dict.values())


def test_its_passes_grow_with_the_layers(gpt2: TransformerBridge) -> None:
    table = compare_with_patching(
        gpt2, random_pairs(8), ["atp_star", "gradient"], components=["heads", "q", "k"], direction="denoising", resamples=0
    )
    assert table["pearson"].notna().all()
    passes = table.loc[table["method"] == "atp_star", ["forwards", "backwards"]]
    assert passes.drop_duplicates().to_numpy().tolist() == [[5, 2]]  # two layers
