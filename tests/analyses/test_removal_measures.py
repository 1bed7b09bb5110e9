"""SaCo, faithfulness correlation, comprehensiveness, sufficiency and AUPRC against plain loops, and in closed form on additive models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from analyses.evaluation import removal_measures as measures
from analyses.evaluation.agreement import mean_with_interval, rank_correlation

ITEMS, BATCH = 17, 4
REMOVABLE = torch.ones(BATCH, ITEMS, dtype=torch.bool)
REMOVABLE[:, 0] = False
REMOVABLE[2, 12:] = False  # eleven are left, and in the next row six, fewer than there are groups
REMOVABLE[3, 7:] = False
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(BATCH, ITEMS, dtype=torch.float64)


@pytest.fixture
def curved() -> Evaluate:
    """A model in which what an item does depends on which others are there."""
    matrix = torch.randn(BATCH, ITEMS, ITEMS, dtype=torch.float64)

    def evaluate(rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        kept = (~removed).double()
        return torch.einsum("ni,nij,nj->n", kept, matrix[rows], kept).tanh() + kept @ matrix[0, 0], removed.any(1)

    return evaluate


def additive(weights: Tensor) -> Evaluate:
    return lambda rows, removed: (7.0 - (weights[rows] * removed).sum(1), removed.any(1))


def value_without(evaluate: Evaluate, row: int, gone: list[int]) -> float:
    removed = torch.zeros(1, ITEMS, dtype=torch.bool)
    removed[0, gone] = True
    return evaluate(torch.tensor([row]), removed)[0].item()


def by_score(scores: Tensor, row: int) -> list[int]:
    """Items that may be removed, the largest score first."""
    return sorted((i for i in range(ITEMS) if REMOVABLE[row, i]), key=lambda i: -scores[row, i].item())


def plain_saco(scores: Tensor, evaluate: Evaluate, row: int) -> float:
    """Algorithm 1 of the paper, line by line."""
    order = by_score(scores, row)
    n = min(10, len(order))
    groups: list[list[int]] = [[] for _ in range(n)]
    for rank, item in enumerate(order):
        groups[math.floor(rank * n / len(order))].append(item)
    whole = value_without(evaluate, row, [])
    salience = [sum(scores[row, i].item() for i in group) for group in groups]
    fall = [whole - value_without(evaluate, row, group) for group in groups]
    coefficient = total = 0.0
    for i in range(n - 1):
        for j in range(i + 1, n):
            weight = salience[i] - salience[j] if fall[i] >= fall[j] else -(salience[i] - salience[j])
            coefficient += weight
            total += abs(weight)
    return coefficient / total


def test_saco_is_the_paper_s_loop(scores: Tensor, curved: Evaluate) -> None:
    found = measures.saco(scores, REMOVABLE, curved)
    assert found.tolist() == pytest.approx([plain_saco(scores, curved, row) for row in range(BATCH)], abs=1e-9)
    assert found.abs().min() > 0.01 and found.abs().max() < 0.99


def test_faithfulness_correlation_is_pearson_over_random_subsets(scores: Tensor, curved: Evaluate) -> None:
    asked: list[tuple[int, list[int]]] = []

    def noted(rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        asked.extend((int(row), gone.nonzero().flatten().tolist()) for row, gone in zip(rows, removed, strict=True) if gone.any())
        return curved(rows, removed)

    found = measures.faithfulness_correlation(scores, REMOVABLE, noted, seed=3)
    for row in range(BATCH):
        subsets = [gone for at, gone in asked if at == row]
        allowed = by_score(scores, row)
        assert len(subsets) == measures.SUBSETS and {len(s) for s in subsets} == {round(0.2 * len(allowed))}
        assert set(itertools.chain(*subsets)) <= set(allowed) and len({tuple(s) for s in subsets}) > len(allowed) / 2
        sums = [sum(scores[row, i].item() for i in subset) for subset in subsets]
        falls = [value_without(curved, row, []) - value_without(curved, row, subset) for subset in subsets]
        assert found[row].item() == pytest.approx(np.corrcoef(sums, falls)[0, 1], abs=1e-9)
    assert found.abs().max() < 0.99
    assert torch.equal(found, measures.faithfulness_correlation(scores, REMOVABLE, curved, seed=3))
    assert not torch.equal(found, measures.faithfulness_correlation(scores, REMOVABLE, curved, seed=4))


@pytest.mark.parametrize("keep", [False, True])
def test_comprehensiveness_and_sufficiency_are_means_over_bins(scores: Tensor, curved: Evaluate, keep: bool) -> None:
    found = (measures.sufficiency if keep else measures.comprehensiveness)(scores, REMOVABLE, curved)
    for row in range(BATCH):
        order, losses = by_score(scores, row), []
        for share in (0.01, 0.05, 0.1, 0.2, 0.5):
            top = order[: max(1, math.ceil(share * len(order)))]
            gone = [i for i in order if i not in top] if keep else top
            losses.append(value_without(curved, row, []) - value_without(curved, row, gone))
        assert found[row].item() == pytest.approx(sum(losses) / 5, abs=1e-9)
    assert found.abs().min() > 1e-3


def test_an_additive_model_is_explained_by_its_shapley_values() -> None:
    """The Shapley value of an item, taken over all orders, is its weight; SaCo and faithfulness correlation are 1 then, and only then."""
    weights = torch.randn(BATCH, ITEMS, dtype=torch.float64)
    evaluate = additive(weights)
    items = [1, 2, 3, 4, 5]
    for i in items:
        gains = []
        for order in itertools.permutations(items):
            gone = [j for j in order[order.index(i) + 1 :]]  # those that come later are not there yet
            gains.append(value_without(evaluate, 1, gone) - value_without(evaluate, 1, [i, *gone]))
        assert sum(gains) / len(gains) == pytest.approx(weights[1, i].item(), abs=1e-12)
    ones = [1.0] * BATCH
    for scores, sign in ((weights, 1), (3 * weights, 1), (-weights, -1)):
        assert measures.faithfulness_correlation(scores, REMOVABLE, evaluate).tolist() == pytest.approx([sign * one for one in ones])
        assert measures.saco(scores, REMOVABLE, evaluate).tolist() == pytest.approx([sign * one for one in ones])
    others = weights.flip(1)
    assert (measures.saco(others, REMOVABLE, evaluate) < 0.9).all()
    assert (measures.faithfulness_correlation(others, REMOVABLE, evaluate) < 0.9).all()


def test_what_an_additive_model_loses_is_the_sum_of_its_largest_weights() -> None:
    weights = torch.randn(BATCH, ITEMS, dtype=torch.float64)
    evaluate, order = additive(weights), by_score(weights, 0)  # of sixteen: 1, 1, 2, 4, 8
    top = sum(weights[0, order[:n]].sum() for n in (1, 1, 2, 4, 8)) / 5
    assert measures.comprehensiveness(weights, REMOVABLE, evaluate)[0].item() == pytest.approx(float(top))
    assert measures.sufficiency(weights, REMOVABLE, evaluate)[0].item() == pytest.approx(float(weights[0, 1:].sum() - top))


def test_scores_without_differences_have_no_coefficient() -> None:
    flat = torch.ones(BATCH, ITEMS, dtype=torch.float64)
    evaluate = additive(torch.randn(BATCH, ITEMS, dtype=torch.float64))
    assert measures.faithfulness_correlation(flat, REMOVABLE, evaluate).isnan().all()
    found = measures.saco(flat, REMOVABLE, evaluate)
    assert found[:3].isfinite().all() and found[3].isnan()  # groups of one item each, all with the same sum


def test_average_precision_is_the_area_under_steps(scores: Tensor) -> None:
    untied = scores.clone()
    scores[:, 5] = scores[:, 6]  # a tie of evidence and none
    evidence = torch.zeros(BATCH, ITEMS, dtype=torch.bool)
    evidence[:, [1, 5, 9]] = True
    evidence[3] = False
    found = measures.average_precision(scores, evidence, REMOVABLE)
    for row in range(3):
        allowed = by_score(scores, row)
        total = sum(evidence[row, i].item() for i in allowed)
        area = before = 0.0
        for threshold in sorted({scores[row, i].item() for i in allowed}, reverse=True):
            chosen = [i for i in allowed if scores[row, i].item() >= threshold]
            hits = sum(evidence[row, i].item() for i in chosen)
            area += (hits / total - before) * hits / len(chosen)
            before = hits / total
        assert found[row].item() == pytest.approx(area, abs=1e-9)
    assert found[3].isnan() and 0 < found[:3].min() and found[:3].max() < 1
    assert measures.average_precision(evidence.double(), evidence, REMOVABLE)[:3].tolist() == [1.0] * 3
    one = torch.zeros(BATCH, ITEMS, dtype=torch.bool)
    one[torch.arange(BATCH), [by_score(untied, row)[3] for row in range(BATCH)]] = True
    assert measures.average_precision(untied, one, REMOVABLE).tolist() == [0.25] * BATCH  # one token in the fourth place


def test_rank_correlation_and_the_interval_of_a_mean() -> None:
    x, y = np.array([[1.0, 2.0, 3.0, 40.0, np.nan]]), np.array([[2.0, 1.0, 3.0, 4.0, np.nan]])
    assert rank_correlation(x, y)[0] == pytest.approx(1 - 6 * 2 / (4 * 15))
    values = np.array([1.0, 2.0, np.nan, 3.0, 6.0])
    mean, low, high = mean_with_interval(values)
    assert mean == 3.0 and 1.0 < low < 2.5 < 3.5 < high < 6.0
    assert np.isnan(mean_with_interval(np.array([np.nan]))).all() and mean_with_interval(np.array([2.0]))[0] == 2.0
