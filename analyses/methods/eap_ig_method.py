"""EAP-IG: gradients averaged along the line between the two runs' embeddings, for components and for edges."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.edges.attribution import EdgeAttribution, edges_of, passes
from analyses.edges.wiring import wiring
from analyses.methods.base import Estimator, Scores, activations, collect, points
from analyses.methods.integrated_path import (
    DEFAULT_STEPS,
    check_steps,
    edge_passes,
    embeddings_moved,
    embeddings_of,
    midpoints,
    named,
    with_edges,
)
from analyses.tasks import PromptPairs
from lens_relevance import propagate
from lens_relevance.ruleset_tables import ruleset


def eap_ig(steps: int = DEFAULT_STEPS) -> Estimator:
    """EAP-IG-inputs (Hanna, Pezzelle, Belinkov 2024, arXiv 2403.17806): (a_clean - a_corrupt) * g, g averaged along a line.

    The line leads from the corrupt to the clean embeddings, and g is the gradient at the middles of `steps` equal parts of it. The authors'
    code takes the left end of each part (k/m of the way, k = 0 to m - 1), so that its first point is the corrupt run itself; the midpoint
    rule needs fewer steps for the same accuracy. As steps grow both come to the same integral.
    """
    check_steps(steps)

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        names, leaf = points(model, components), embeddings_of(model)
        clean, corrupt = (activations(model, tokens, [*names, leaf], pairs=pairs) for tokens in (pairs.clean, pairs.corrupt))
        total: dict[str, Tensor] = {}
        for share in midpoints(steps):
            with embeddings_moved(model, clean[leaf] - corrupt[leaf], share):
                cache = propagate(
                    model, pairs.corrupt, pairs.target, rules="gradient", names_filter=names, attention_mask=pairs.corrupt_mask
                )
            for name in names:
                total[name] = total.get(name, 0) + cache.coefficients[cache.canonical(name)]
        return collect(model, components, lambda point: (clean[point] - corrupt[point]) * total[point] / steps)

    def edges(model: TransformerBridge, pairs: PromptPairs) -> EdgeAttribution:
        return integrated_edges(model, pairs, steps)

    return Estimator(named("eap_ig", steps), scores, forwards=steps + 2, backwards=steps, edges=edges)


def integrated_edges(model: TransformerBridge, pairs: PromptPairs, steps: int = DEFAULT_STEPS) -> EdgeAttribution:
    """Edges (u_clean - u_corrupt) . g_v, g_v averaged as `eap_ig` does. One forward and backward per step.

    Source: EAP-IG (Hanna et al. 2024, arXiv 2403.17806).

    Raises:
        RelevanceError: fewer than one step.
    """
    check_steps(steps)
    streams, plain = wiring(model), ruleset("gradient")
    # what is written is that of the two runs themselves
    ((values, _),) = passes(
        model, streams, pairs.clean, target=pairs.target, rules="gradient", reference=pairs.corrupt, attention_mask=pairs.clean_mask
    )
    total: EdgeAttribution | None = None
    for cache, constants in edge_passes(model, streams, pairs, midpoints(steps)):
        total = with_edges(total, edges_of(streams, cache, constants, table=plain, values=values)[0], 1 / steps)
    assert total is not None
    return total
