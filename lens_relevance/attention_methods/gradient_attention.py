"""Gradient x attention: how much each entry of the patterns contributes to the target, to first order."""

from __future__ import annotations

from lens_relevance.attention_methods.accumulation import Accumulation, Total
from lens_relevance.attention_methods.run import AttentionRun


def accumulate(run: AttentionRun) -> Accumulation:
    """matrix = sum over layers, mean over heads, of A * dA (signed); scores sum it over all queries.

    All queries count and not the explained row alone: dA is the target's own gradient, so each entry's A * dA is already its share of it.
    """
    maps = [run.relevance(layer) for layer in range(run.n_layers)]
    return Total([one / one.shape[1] for one in maps], run.mask.to(run.start.dtype))
