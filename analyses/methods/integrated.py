"""Estimates by gradients along the straight path between the two runs' embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from analyses.methods.base import EMBEDDINGS, Component, Estimator, Scores, activations, collect, points
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, propagate

DEFAULT_STEPS = 20


def eap_ig(steps: int = DEFAULT_STEPS) -> Estimator:
    """EAP-IG-inputs (Hanna, Pezzelle, Belinkov 2024): g averaged over the embeddings e_corrupt + k/m (e_clean - e_corrupt), k = 1 to m."""
    _check_steps(steps)

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        names = points(model, components)
        clean, corrupt = activations(model, pairs.clean, names, pairs), activations(model, pairs.corrupt, names, pairs)
        total: dict[str, Tensor] = {}
        for k in range(1, steps + 1):
            step = _between(model, pairs, names, clean[EMBEDDINGS] - corrupt[EMBEDDINGS], k / steps)
            for name in names:
                total[name] = total.get(name, 0) + step[name][1]
        return collect(model, components, lambda point: (clean[point] - corrupt[point]) * total[point] / steps)

    return Estimator(f"eap_ig ({steps} steps)", scores, forwards=steps + 2, backwards=steps)


def conductance(steps: int = DEFAULT_STEPS) -> Estimator:
    """Integrated gradients carried to hidden units (conductance, Dhamdhere et al. 2018), by the trapezoid rule over `steps` intervals.

    Sum over k of (a_k+1 - a_k) * mean(g_k, g_k+1) along the straight path between the embeddings: complete at every cut as steps grow.
    """
    _check_steps(steps)

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        names = points(model, components)
        ends = [activations(model, tokens, [EMBEDDINGS], pairs)[EMBEDDINGS] for tokens in (pairs.clean, pairs.corrupt)]
        total: dict[str, Tensor] = {}
        last = _between(model, pairs, names, ends[0] - ends[1], 0.0)
        for k in range(1, steps + 1):
            here = _between(model, pairs, names, ends[0] - ends[1], k / steps)
            for name in names:
                (a, g), (b, h) = last[name], here[name]
                total[name] = total.get(name, 0) + (b - a) * (g + h) / 2
            last = here
        return collect(model, components, lambda point: total[point])

    return Estimator(f"conductance ({steps} steps)", scores, forwards=steps + 3, backwards=steps + 1)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise RelevanceError(f"integrated gradients need at least one step, not {steps}")


def _between(
    model: Any, pairs: PromptPairs, names: Sequence[str], change: Float[Tensor, "batch pos d_model"], share: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation and gradient at each name, the corrupt embeddings moved by a share of `change`."""
    with model.hooks(fwd_hooks=[(EMBEDDINGS, lambda embeddings, hook: embeddings + share * change)]):
        cache = propagate(model, pairs.corrupt, pairs.target, rules="gradient", names_filter=names, attention_mask=pairs.corrupt_mask)
    return {name: (cache.activations[cache.canonical(name)], cache.coefficients[cache.canonical(name)]) for name in names}
