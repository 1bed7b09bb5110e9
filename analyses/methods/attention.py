"""Heads by token-to-token relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analyses.methods.base import Component, Estimator, Scores
from analyses.tasks import PromptPairs
from lens_relevance.attention_methods import token_relevance


def by_attention(method: str) -> Estimator:
    """Heads by token-to-token relevance (`lens_relevance.attention_methods`): the part of the explained token's scores that passes a head.

    These methods see the clean prompt alone and mostly have no sign: they can find the heads that matter, but not which way they push.
    """

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        found = token_relevance(model, pairs.clean, pairs.target, method=method, attention_mask=pairs.clean_mask)
        return {"heads": found.heads} if components else {}

    return Estimator(method, scores, forwards=1, backwards=1, components=("heads",), single_run=True)
