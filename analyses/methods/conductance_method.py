"""Conductance: integrated gradients of hidden units."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.methods.base import Estimator, Scores, activations, collect, points
from analyses.methods.integrated_path import DEFAULT_STEPS, check_steps, embeddings_moved, embeddings_of, named
from analyses.tasks import PromptPairs
from lens_relevance import propagate


def conductance(steps: int = DEFAULT_STEPS) -> Estimator:
    """Integrated gradients carried to hidden units (conductance, Dhamdhere et al. 2018), by the trapezoid rule over `steps` intervals.

    Sum over k of (a_k+1 - a_k) * mean(g_k, g_k+1) along the straight path between the embeddings: complete at every cut as steps grow. CEAP
    (arXiv 2606.16920) recommends it for nodes, in place of EAP-IG, for its stability.
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

    return Estimator(named("conductance", steps), scores, forwards=steps + 3, backwards=steps + 1)
