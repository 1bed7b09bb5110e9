"""Chefer et al. 2021b (ICCV, arXiv 2103.15679): self-attention of one token set. For two sets see update_rules.py."""

from __future__ import annotations

import torch

from lens_relevance.attention_methods.accumulation import Accumulation, Chain, Step
from lens_relevance.attention_methods.run import AttentionRun


def positive_relevance(run: AttentionRun) -> list[torch.Tensor]:
    """(dA * A)^+ / n_heads per layer, [batch, head, token, source]: summed over heads this is the paper's A-bar."""
    maps = [run.relevance(layer) for layer in range(run.n_layers)]
    return [one.clamp(min=0) / one.shape[1] for one in maps]


def accumulate(run: AttentionRun) -> Accumulation:
    """R = I, then R <- R + A-bar R in every layer.

    The explained token keeps the 1 that it starts with, as in the paper: compare other tokens with each other.
    """
    ones = torch.ones_like(run.start)
    return Chain([Step(ones, part) for part in positive_relevance(run)], run.start, run.mask)
