"""How faithful scores of items are to a model, by what it does without some of them: four published measures with one signature.

    (scores [batch, item], removable [batch, item], evaluate) -> [batch]

`evaluate` (see `analyses.perturbation.removal`) says what the target is without some items, and with it what "removed" means. The papers
measure the probability of a class; here it is whatever the target is, in its units. Each is NaN where it is not defined.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.evaluation.agreement import correlation
from analyses.perturbation.removal import Evaluate, removal_ranks

GROUPS = 10
"""Groups of items in SaCo, as in the paper; with fewer items each is a group."""
SUBSETS, SUBSET_SHARE = 32, 0.2
"""Random subsets of faithfulness correlation, and the part of the items that each of them has (at least one item)."""
BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Parts of the items that count as rationale, as in ERASER; rounded up, so that each has at least one item."""


def saco(scores: Float[Tensor, "batch item"], removable: Bool[Tensor, "batch item"], evaluate: Evaluate) -> Float[Tensor, " batch"]:
    """Salience-guided faithfulness coefficient (Wu et al., CVPR 2024, algorithm 1), between -1 and 1.

    Items go by score into `GROUPS` groups of equal size (up to one item), and each group is removed alone. Of two groups the one with the
    larger sum of scores should lose the target more: the difference of the two sums counts for the scores where it does, against them where
    it does not, and the sum over all pairs of groups is divided by what it could be at most.
    """
    count = removable.sum(1, keepdim=True)
    ranks = removal_ranks(scores, removable, "MoRF")
    group = (ranks * count.clamp(max=GROUPS) // count.clamp(min=1)).masked_fill(~removable, -1)
    sets = group.unsqueeze(1) == torch.arange(GROUPS).reshape(1, -1, 1)  # [batch, group, item]
    row, column = sets.any(-1).nonzero(as_tuple=True)
    lost = torch.full(sets.shape[:2], float("nan"), dtype=torch.float64)
    lost[row, column] = _whole(removable, evaluate)[row] - evaluate(row, sets[row, column])[0]
    salience = (scores.double().masked_fill(~removable, 0.0).unsqueeze(1) * sets).sum(-1)
    difference = salience.unsqueeze(2) - salience.unsqueeze(1)
    there = ~lost.isnan()
    pair = there.unsqueeze(2) & there.unsqueeze(1) & torch.ones(GROUPS, GROUPS).triu(1).bool()
    sign = torch.where(lost.unsqueeze(2) >= lost.unsqueeze(1), 1.0, -1.0)
    difference = difference.masked_fill(~pair, 0.0)
    return (sign * difference).sum((1, 2)) / difference.abs().sum((1, 2))


def faithfulness_correlation(
    scores: Float[Tensor, "batch item"], removable: Bool[Tensor, "batch item"], evaluate: Evaluate, *, seed: int = 0
) -> Float[Tensor, " batch"]:
    """Faithfulness correlation (Bhatt et al. 2020, definition 3, arXiv 2005.00631), between -1 and 1.

    Pearson's correlation, over random subsets of equal size, of the sum of the scores in a subset with what the target loses without it.
    The subsets are the same whatever the scores.
    """
    batch, items = removable.shape
    size = (removable.sum(1, keepdim=True) * SUBSET_SHARE).round().clamp(min=1)
    drawn = torch.rand(batch, SUBSETS, items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    order = drawn.masked_fill(~removable.unsqueeze(1), 2.0).argsort(-1).argsort(-1)
    sets = (order < size.unsqueeze(1)) & removable.unsqueeze(1)
    rows = torch.arange(batch).repeat_interleave(SUBSETS)
    without = evaluate(rows, sets.reshape(-1, items))[0].double().reshape(batch, SUBSETS)
    lost = _whole(removable, evaluate).unsqueeze(1) - without
    return torch.from_numpy(correlation(_sums(scores, sets).numpy(), lost.numpy()))


def comprehensiveness(
    scores: Float[Tensor, "batch item"], removable: Bool[Tensor, "batch item"], evaluate: Evaluate
) -> Float[Tensor, " batch"]:
    """What the target loses without the items with the largest scores, mean over `BINS` (ERASER, DeYoung et al. 2020); more is better."""
    return _mean_loss(scores, removable, evaluate, keep=False)


def sufficiency(scores: Float[Tensor, "batch item"], removable: Bool[Tensor, "batch item"], evaluate: Evaluate) -> Float[Tensor, " batch"]:
    """What the target loses when these items alone are left, mean over `BINS` (ERASER, DeYoung et al. 2020); less is better."""
    return _mean_loss(scores, removable, evaluate, keep=True)


def average_precision(
    scores: Float[Tensor, "batch item"], evidence: Bool[Tensor, "batch item"], candidates: Bool[Tensor, "batch item"]
) -> Float[Tensor, " batch"]:
    """Plausibility: area under the curve of precision over recall of the scores against marked evidence (AUPRC; ERASER), between 0 and 1.

    It is the average precision, without interpolation: at each item of the evidence, which part of the candidates with at least its score
    is evidence, mean over the evidence. Scores without meaning have about the part of the candidates that is evidence.

    Args:
        evidence: what was marked; items that are no candidates do not count.
        candidates: the items that scores are compared over.
    """
    evidence = (evidence & candidates).cpu()
    scores = scores.detach().double().cpu()
    above = (scores.unsqueeze(1) >= scores.unsqueeze(2)) & candidates.cpu().unsqueeze(1)  # [batch, threshold, item]
    precision = (above & evidence.unsqueeze(1)).sum(-1).double() / above.sum(-1)
    return precision.masked_fill(~evidence, 0.0).sum(1) / evidence.sum(1)


def _mean_loss(scores: Tensor, removable: Tensor, evaluate: Evaluate, *, keep: bool) -> Float[Tensor, " batch"]:
    ranks, count = removal_ranks(scores, removable, "MoRF"), removable.sum(1, keepdim=True)
    whole, rows, losses = _whole(removable, evaluate), torch.arange(len(removable)), []
    for share in BINS:
        top = ranks < torch.from_numpy(np.ceil(share * count.numpy()))
        losses.append(whole - evaluate(rows, (~top if keep else top) & removable)[0].double())
    return torch.stack(losses).mean(0)


def _whole(removable: Tensor, evaluate: Evaluate) -> Float[Tensor, " batch"]:
    return evaluate(torch.arange(len(removable)), torch.zeros_like(removable))[0].double()


def _sums(scores: Tensor, sets: Tensor) -> Float[Tensor, "batch subset"]:
    return torch.where(sets, scores.double().unsqueeze(1), torch.zeros((), dtype=torch.float64)).sum(-1)
