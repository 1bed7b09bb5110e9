"""The softmax itself: with masked rows, and between two runs (see docs/derivation.md)."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax in which a row with every entry masked (-inf) gives 0, not NaN."""
    dead = torch.isneginf(scores).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def is_masked(scores: Tensor) -> Tensor:
    """True where a score was masked: -inf, or finfo.min and what a mask of finfo.min added to a score makes of it."""
    return scores <= torch.finfo(scores.dtype).min / 2


def logarithmic_mean(s1: Tensor, s2: Tensor) -> Tensor:
    """l_i = (p1_i - p2_i) / (log p1_i - log p2_i) of p = softmax(s), stable; p_i where the two are equal; 0 where masked in both.

    Written as max(p1, p2) (1 - exp(-|d|)) / |d| with d from the scores themselves, so that it stays right where probabilities underflow.
    """
    both = is_masked(s1) & is_masked(s2)
    log_p1, log_p2 = (torch.log_softmax(s, -1) for s in (s1, s2))
    gap = (log_p1 - log_p2).abs()
    zero = both | ~(gap > 0)  # also where -inf - -inf gave NaN
    gap = torch.where(zero, torch.ones_like(gap), gap)
    mean = torch.maximum(log_p1, log_p2).exp() * torch.where(zero, torch.ones_like(gap), -torch.expm1(-gap) / gap)
    return mean.masked_fill(both, 0.0).nan_to_num(0.0)  # NaN is left only in rows with every entry masked


def pull_back(l: Tensor, upstream: Tensor) -> Tensor:  # noqa: E741
    """ds_i = l_i (g_i - sum_j l_j g_j / sum_k l_k): the transpose of the pair softmax, which is symmetric."""
    total = l.sum(-1, keepdim=True)
    mean = (l * upstream).sum(-1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total))
    return l * (upstream - mean)
