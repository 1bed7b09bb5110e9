"""AtP*'s correction for queries and keys: their effect through the softmax recomputed, not linearised."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.methods.base import Estimator, Scores, collect, hidden, points
from analyses.tasks import PromptPairs
from lens_relevance import propagate
from lens_relevance.logit_reading import without_logits


def atp_star() -> Estimator:
    """Attribution patching with the correction of AtP* for queries and keys (Kramar et al. 2024, arXiv 2403.00745).

    Attribution patching multiplies the change of q with a gradient that passes the softmax, and where a pattern is saturated that is 0.
    The paper recomputes the pattern with the other run's q (or k) and multiplies the change of the pattern with its gradient. Here the
    head's output is recomputed: sum of (z' - z) * g_z, z' the output with the other run's q (or k) and this run's k (or q) and v. As z is
    linear in the pattern for given v, the two are the same number.

    Our reading, as only summaries of the paper were at hand: its nodes are the queries or the keys of a head at one position. A component
    here is a head at all its positions, as `activation_patching` patches q and k: they are set together and the softmax is taken once, so
    that of what patching does to q and k only the part above z is linearised. Under grouped-query attention a key's score is the sum over
    its group. v and all other components get plain attribution patching; the paper's GradDrop is not included.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        corrected = [component for component in components if component in ("q", "k")]
        plain = [component for component in components if component not in corrected]
        heads = points(model, ["heads"]) if corrected else []
        names = list(dict.fromkeys([*points(model, components), *heads]))
        cache = propagate(
            model,
            pairs.corrupt,
            pairs.target,
            rules="gradient",
            names_filter=names,
            reference=pairs.clean,
            attention_mask=pairs.corrupt_mask,
        )
        by_component = collect(model, plain, lambda point: -cache[point])
        z = {point: cache.activations[cache.canonical(point)] for point in heads}
        g_z = {point: cache.coefficients[cache.canonical(point)] for point in heads}
        for component in corrected:
            clean = {point: cache.reference_activations[cache.canonical(point)] for point in points(model, [component])}
            anew, n_nodes = recomputed_outputs(model, pairs, clean, z), next(iter(clean.values())).shape[2]
            effects = {point: (anew[point] - z[point]) * g_z[point] for point in heads}
            by_component[component] = collect(model, ["heads"], effects.__getitem__)["heads"].unflatten(2, (n_nodes, -1)).sum(3)
        return {component: by_component[component] for component in components}

    return Estimator("atp_star", scores, forwards=4, backwards=1)


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
