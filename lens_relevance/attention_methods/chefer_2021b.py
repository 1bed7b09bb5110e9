"""Chefer et al. 2021b (ICCV, arXiv 2103.15679), for one token set and for two (see update_rules.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_relevance.attention_methods.accumulation import Accumulation, Chain, Step
from lens_relevance.attention_methods.run import AttentionRun
from lens_relevance.attention_methods.two_sets import TwoSets


def positive_relevance(run: AttentionRun) -> list[torch.Tensor]:
    """(dA * A)^+ / n_heads per layer, [batch, head, token, source]: summed over heads this is the paper's A-bar."""
    maps = [run.relevance(layer) for layer in range(run.n_layers)]
    return [one.clamp(min=0) / one.shape[1] for one in maps]


def accumulate(run: AttentionRun) -> Accumulation:
    """R = I, then R <- R + A-bar R in every layer; two token sets by the paper's bi-modal rules.

    The explained token keeps the 1 that it starts with, as in the paper: compare other tokens with each other.
    """
    if len(run.masks) == 2:
        return over_two_sets(run, [None] * run.n_layers)
    ones = torch.ones_like(run.start)
    return Chain([Step(ones, part) for part in positive_relevance(run)], run.start, run.mask)


def over_two_sets(run: AttentionRun, weights: Sequence[tuple[Tensor, Tensor] | None]) -> TwoSets:
    """The bi-modal updates over a run's attentions, with (alpha, beta) of each one's querying tokens."""
    s, q = run.masks
    blocks = [
        part[:, :, run.span(one.queries), run.span(one.sources)] for one, part in zip(run.attentions, positive_relevance(run), strict=True)
    ]
    return TwoSets(run.attentions, blocks, weights, run.start, (run.masks[s], run.masks[q]), s)
