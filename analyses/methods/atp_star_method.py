"""AtP*: attribution patching with queries and keys through the softmax recomputed, and gradients that miss one layer after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.methods.base import Estimator, Scores, collect, hidden, points
from analyses.models.structure import n_layers
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, propagate
from lens_relevance.logit_reading import without_logits


def atp_star() -> Estimator:
    """AtP* (Kramar et al. 2024, arXiv 2403.00745): attribution patching with its two corrections, for saturation and for cancellation.

    **Queries and keys.** Attribution patching multiplies the change of q with a gradient that passes the softmax, and where a pattern is
    saturated that is 0. The paper recomputes the pattern with the other run's q (or k) and multiplies the change of the pattern with its
    gradient. Here the head's output is recomputed: sum of (z' - z) * g_z, z' the output with the other run's q (or k) and this run's k (or
    q) and v. As z is linear in the pattern for given v, the two are the same number.

    **GradDrop.** Effects along different paths can cancel in the gradient though they do not when the component is patched. So the estimate
    is taken once for each layer, with the gradient through what that layer writes set to 0, and the magnitudes are averaged:
    1 / (L - 1) * sum over dropped layers of |estimate|. A component's own layer, which gives it nothing, is left out; for the residual
    stream, which belongs to none, the mean is over all L. A model of one layer has nothing to drop.

    Our reading, as only summaries of the paper were at hand: its nodes are the queries or the keys of a head at one position. A component
    here is a head at all its positions, as `activation_patching` patches q and k: they are set together and the softmax is taken once, so
    that of what patching does to q and k only the part above z is linearised. Under grouped-query attention a key's score is the sum over
    its group. The paper's scores are magnitudes; the sign here is that of the sum of the estimates.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        n, estimates = n_layers(model), []
        reference: RelevanceCache | None = None
        heads = points(model, ["heads"]) if {"q", "k"} & set(components) else []
        names = list(dict.fromkeys([*points(model, components), *heads]))
        anew: dict[str, tuple[dict[str, Tensor], int]] | None = None
        for layer in range(n):
            with dropped(model, layer if n > 1 else None):
                cache = propagate(
                    model,
                    pairs.corrupt,
                    pairs.target,
                    rules="gradient",
                    names_filter=names,
                    reference=pairs.clean if reference is None else None,
                    attention_mask=pairs.corrupt_mask,
                )
            reference = cache if reference is None else reference
            if anew is None:
                anew = {name: _recomputed(model, pairs, reference, name, heads) for name in components if name in ("q", "k")}
            estimates.append(_estimates(model, cache, reference, anew, components))
        return {name: without_cancellation(torch.stack([found[name] for found in estimates]), name) for name in components}

    return Estimator("atp_star", scores, forwards=3, backwards=0, per_layer=1)


@contextmanager
def dropped(model: TransformerBridge, layer: int | None) -> Iterator[None]:
    """Inside, no gradient passes what attention and MLP of a layer write; the residual connection keeps its own."""

    def drop(x: Tensor, hook: Any) -> Tensor:
        x = x.view_as(x)
        if x.requires_grad:
            x.register_hook(torch.zeros_like)
        return x

    written = [] if layer is None else [COMPONENTS[name].write_at(layer) for name in ("attn", "mlp")]
    with model.hooks(fwd_hooks=[(name, drop) for name in written if name in model.hook_dict]):
        yield


def without_cancellation(estimates: Float[Tensor, "dropped batch layer index"], component: str) -> Float[Tensor, "batch layer index"]:
    """The mean magnitude over dropped layers other than a component's own, with the sign of the sum."""
    n = len(estimates)
    if n == 1:
        return estimates[0]
    if component != "resid":
        own = torch.eye(n, dtype=torch.bool, device=estimates.device)[:, None, :, None]
        estimates = estimates.masked_fill(own, 0.0)
    mean = estimates.abs().sum(0) / (n if component == "resid" else n - 1)
    return torch.where(estimates.sum(0) < 0, -mean, mean)


def _recomputed(
    model: TransformerBridge, pairs: PromptPairs, pair: RelevanceCache, component: str, heads: Sequence[str]
) -> tuple[dict[str, Tensor], int]:
    """z' - z by the point of z, and the number of heads that the component counts."""
    clean = {point: pair.reference_activations[pair.canonical(point)] for point in points(model, [component])}
    z = {point: pair.activations[pair.canonical(point)] for point in heads}
    anew = recomputed_outputs(model, pairs, clean, z)
    return {point: anew[point] - z[point] for point in heads}, next(iter(clean.values())).shape[2]


def _estimates(
    model: TransformerBridge,
    cache: RelevanceCache,
    pair: RelevanceCache,
    anew: dict[str, tuple[dict[str, Tensor], int]],
    components: Sequence[str],
) -> Scores:
    """Attribution patching under the coefficients of `cache`, of the activations of `pair`; z' - z for queries and keys."""

    def change(point: str) -> Tensor:
        name = pair.canonical(point)
        return (pair.reference_activations[name] - pair.activations[name]) * cache.coefficients[name]

    found = collect(model, [name for name in components if name not in anew], change)
    for name, (differences, n_nodes) in anew.items():
        effects = {point: d * cache.coefficients[cache.canonical(point)] for point, d in differences.items()}
        found[name] = collect(model, ["heads"], effects.__getitem__)["heads"].unflatten(2, (n_nodes, -1)).sum(3)
    return found


@torch.no_grad()
def recomputed_outputs(model: TransformerBridge, pairs: PromptPairs, clean: dict[str, Tensor], z: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every head would give in the corrupt run with the clean run's q or k, by the point of its z.

    One forward for all layers: each one's q or k is exchanged, and its z set back before the next layer reads it. Heads do not look at
    each other's q and k, so all of them are exchanged at once.
    """
    anew: dict[str, Tensor] = {}

    def exchange(name: str, x: Tensor, hook: Any) -> Tensor:
        return clean[name].to(x)

    def set_back(name: str, x: Tensor, hook: Any) -> Tensor:
        anew[name] = x
        return z[name]

    hooks = [(name, partial(exchange, name)) for name in clean] + [(name, partial(set_back, name)) for name in z]
    with without_logits(model, pairs.corrupt), model.hooks(fwd_hooks=hooks):
        model(pairs.corrupt, **hidden(pairs))
    return anew
