"""Estimates by the coefficients of a ruleset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analyses.methods.base import Component, Estimator, Scores, collect, points
from analyses.tasks import PromptPairs
from lens_relevance import propagate
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset


def by_ruleset(rules: str | Table, name: str | None = None) -> Estimator:
    """(a_clean - a_corrupt) * g under a ruleset: denoising is -propagate(corrupt, reference=clean)."""

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        cache = propagate(
            model,
            pairs.corrupt,
            pairs.target,
            rules=rules,
            names_filter=points(model, components),
            reference=pairs.clean,
            attention_mask=pairs.corrupt_mask,
        )
        return collect(model, components, lambda point: -cache[point])

    symmetric = needs_reference(ruleset(rules))
    return Estimator(name or (rules if isinstance(rules, str) else "custom"), scores, forwards=2, backwards=1, symmetric=symmetric)
