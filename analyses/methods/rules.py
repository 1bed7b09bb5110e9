"""Estimates by the coefficients of a ruleset."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from analyses.methods.base import Component, Estimator, Scores, collect, points
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, propagate
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset

_FIRST = "blocks.0.hook_resid_pre"
_COMPLETENESS = 1e-3


def by_ruleset(rules: str | Table, name: str | None = None) -> Estimator:
    """(a_clean - a_corrupt) * g under a ruleset: denoising is -propagate(corrupt, reference=clean)."""

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        names = points(model, components)
        cache = propagate(
            model,
            pairs.corrupt,
            pairs.target,
            rules=rules,
            names_filter=list(dict.fromkeys([*names, _FIRST])) if complete else names,
            reference=pairs.clean,
            attention_mask=pairs.corrupt_mask,
        )
        if complete:
            _warn_if_incomplete(cache)
        return collect(model, components, lambda point: -cache[point])

    complete = isinstance(rules, str) and rules == "deeplift"
    symmetric = needs_reference(ruleset(rules))
    return Estimator(name or (rules if isinstance(rules, str) else "custom"), scores, forwards=2, backwards=1, symmetric=symmetric)


def _warn_if_incomplete(cache: RelevanceCache) -> None:
    """Say so where relevance does not add up to the difference of the target, as that of `deeplift` does in every sound run."""
    assert cache.reference_value is not None
    gaps, relevance = (cache.value - cache.reference_value).double(), cache[_FIRST].double().flatten(1)
    if len(gaps) > 1 and bool((gaps == gaps[0]).all()):  # one number for all rows
        gaps, relevance = gaps[:1], relevance.reshape(1, -1)
    error, gap = float((relevance.sum(1).to(gaps) - gaps).abs().mean()), float(gaps.abs().mean())
    precision = torch.finfo(cache.activations[cache.canonical(_FIRST)].dtype).eps
    if error > max(_COMPLETENESS, 16 * precision) * gap and error > 100 * precision * float(relevance.abs().sum(1).mean()):
        warnings.warn(
            f"deeplift's relevance misses the difference of the target between the two runs ({gap:.3g} on average) by {error:.3g}, which "
            "in a sound run it cannot: is the target a function with jumps, or did something change the model or the runs in between? "
            "propagate(..., audit=True).conservation() says where it stays",
            stacklevel=2,
        )
