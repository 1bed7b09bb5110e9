"""Conductance: integrated gradients of hidden units, for components and for edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.edges.attribution import EdgeAttribution, edges_of
from analyses.edges.heads import Constants
from analyses.edges.wiring import wiring
from analyses.methods.base import Estimator, Scores, activations, collect, points
from analyses.methods.integrated_path import (
    DEFAULT_STEPS,
    check_steps,
    edge_passes,
    embeddings_moved,
    embeddings_of,
    named,
    with_edges,
)
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, propagate
from lens_relevance.ruleset_tables import ruleset


def conductance(steps: int = DEFAULT_STEPS) -> Estimator:
    """Integrated gradients carried to hidden units (conductance, Dhamdhere et al. 2018), by the trapezoid rule over `steps` intervals.

    Sum over k of (a_k+1 - a_k) * mean(g_k, g_k+1) along the straight path between the embeddings: complete at every cut as steps grow.

    Edges: sum over k of (u_k+1 - u_k) . mean(g_v,k, g_v,k+1), u what the writer contributes and g_v the gradient at the reader's own input.
    CEAP (Wu, Tonin & Cevher 2026, arXiv 2606.16920) scores edges by conductance in place of EAP-IG, for its stability; our reading, as only
    the abstract was at hand: that each step has the change of its own part of the path, and not that of the whole.
    """
    check_steps(steps)

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        names, leaf = points(model, components), embeddings_of(model)
        clean, corrupt = (activations(model, tokens, [leaf], pairs=pairs)[leaf] for tokens in (pairs.clean, pairs.corrupt))

        def at(share: float) -> dict[str, tuple[Tensor, Tensor]]:
            with embeddings_moved(model, clean - corrupt, share):
                cache = propagate(
                    model, pairs.corrupt, pairs.target, rules="gradient", names_filter=names, attention_mask=pairs.corrupt_mask
                )
            return {name: (cache.activations[cache.canonical(name)], cache.coefficients[cache.canonical(name)]) for name in names}

        total: dict[str, Tensor] = {}
        last = at(0.0)
        for k in range(1, steps + 1):
            here = at(k / steps)
            for name in names:
                (a, g), (b, h) = last[name], here[name]
                total[name] = total.get(name, 0) + (b - a) * (g + h) / 2
            last = here
        return collect(model, components, lambda point: total[point])

    def edges(model: TransformerBridge, pairs: PromptPairs) -> EdgeAttribution:
        return _edges(model, pairs, steps)

    return Estimator(named("conductance", steps), scores, forwards=steps + 3, backwards=steps + 1, edges=edges)


def _edges(model: TransformerBridge, pairs: PromptPairs, steps: int) -> EdgeAttribution:
    """The sum over the steps, ordered by the gradients: that of point k meets (u_k+1 - u_k-1) / 2, at the ends the one change there is."""
    streams, plain = wiring(model), ruleset("gradient")
    total: EdgeAttribution | None = None
    kept: list[tuple[RelevanceCache, Constants]] = []

    def add(total: EdgeAttribution | None, here: int, before: int, after: int) -> EdgeAttribution:
        cache, constants = kept[here]
        change = replace(kept[after][0], reference_activations=kept[before][0].activations)
        return with_edges(total, edges_of(streams, cache, constants, table=plain, values=change)[0], 0.5)

    for point in edge_passes(model, streams, pairs, [k / steps for k in range(steps + 1)]):
        kept = [*kept[-2:], point]
        if len(kept) == 2:
            total = add(total, 0, 0, 1)
        elif len(kept) == 3:
            total = add(total, 1, 0, 2)
    return add(total, -1, -2, -1)
