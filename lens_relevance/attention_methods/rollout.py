"""Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928)."""

from __future__ import annotations

import torch

from lens_relevance.attention_methods.accumulation import Accumulation, Chain, Step
from lens_relevance.attention_methods.run import AttentionRun


def steps(run: AttentionRun) -> list[Step]:
    """A^ = (A + I) / row sum with A the mean over heads, so that a token keeps as much of itself as it gathers. Rows sum to 1."""
    found = []
    for layer in range(run.n_layers):
        pattern = run.pattern(layer) / run.pattern(layer).shape[1]
        row_sum = 1 + pattern.sum((1, 3))
        found.append(Step(1 / row_sum, pattern / row_sum[:, None, :, None]))
    return found


def accumulate(run: AttentionRun) -> Accumulation:
    """The product A^_L ... A^_1. It does not know the target: only its row is chosen by it. Padding keeps nothing.

    With two token sets the product is over the tokens of both, and those that do not ask in a layer keep all of themselves (derived here).
    """
    chained = [Step(torch.where(run.mask, step.kept, 0 * step.kept), step.parts) for step in steps(run)]
    return Chain(chained, run.start, run.mask)
