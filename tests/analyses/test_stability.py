"""Stability over pairs against loops over resamples, splits and signs, and against scipy's own permutation test."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy.stats import permutation_test

from analyses.evaluation.stability import FLIPS, RESAMPLES, SPLITS, resampling_weights, stability


def scores(n_components: int = 12, n: int = 16, *, missing: bool = False) -> np.ndarray:
    """Scores of which the first components are large, [component, pair]."""
    rng = np.random.default_rng(3)
    values = (
        rng.standard_normal((n_components, n)) + np.linspace(2.0, 0.0, n_components)[:, None] * (-1) ** np.arange(n_components)[:, None]
    )
    if missing:
        values[2, :5] = np.nan
    return values


def top(values: np.ndarray, k: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])


@pytest.mark.parametrize("missing", [False, True])
def test_frequency_and_jaccard_are_those_of_a_loop(missing: bool) -> None:
    values, k = scores(missing=missing), 3
    result = stability(values, k)
    drawn, halves, signs = resampling_weights(values.shape[1])
    assert signs.shape == (FLIPS, 16) and (signs[0] == 1).all() and set(np.unique(signs)) == {-1.0, 1.0}
    assert drawn.shape == (RESAMPLES, 16) and (drawn.sum(1) == 16).all() and len(np.unique(drawn, axis=0)) == RESAMPLES
    counts = np.zeros(len(values))
    for counted in drawn:
        repeated = np.repeat(np.arange(16), counted.astype(int))
        for i in top(np.nanmean(values[:, repeated], 1), k):
            counts[i] += 1
    np.testing.assert_allclose(result.frequency, counts / RESAMPLES)
    assert 0 < result.frequency.min(where=counts > 0, initial=1) < 1 and result.frequency.sum() == pytest.approx(k)
    shares = []
    for one, other in zip(halves[::2], halves[1::2], strict=True):
        assert (one + other == 1).all() and one.sum() == 8
        a, b = (top(np.nanmean(values[:, half == 1], 1), k) for half in (one, other))
        shares.append(len(a & b) / len(a | b))
    assert len(shares) == SPLITS and 0 < result.jaccard < 1
    assert result.jaccard == pytest.approx(float(np.mean(shares)))


@pytest.mark.parametrize("n", [5, 9, 12])
def test_p_values_are_those_of_all_signs(n: int) -> None:
    """The exact test, by a loop over all signs and by scipy; of 12 pairs 1000 of the 4096 choices are drawn."""
    values = scores(n=n)
    ours = stability(values, 3).p_value
    for row, p_value in zip(values, ours, strict=True):
        extreme = [abs(np.dot(signs, row)) >= abs(row.sum()) - 1e-12 for signs in product((-1, 1), repeat=n)]
        exact = float(np.mean(extreme))
        by_scipy = permutation_test((row,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided").pvalue
        assert exact == pytest.approx(by_scipy)
        # four standard errors of a share of 1000 draws
        assert p_value == pytest.approx(exact, abs=1e-12 if 2**n <= FLIPS else 0.001 + 4 * (exact * (1 - exact) / FLIPS) ** 0.5)


def test_discoveries_keep_their_rate() -> None:
    """Of 400 components 100 have an effect; those named at a rate of 10 % are in fact mostly right, and nearly all are found."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((400, 24))
    values[:100] += 1.5
    result = stability(values, 10)
    named = result.q_value <= 0.1
    assert named[:100].mean() > 0.95 and named[100:].sum() / named.sum() <= 0.15
    # Benjamini and Hochberg by hand: the largest rank i with p_(i) <= i/m q
    p = np.sort(result.p_value)
    largest = max(i for i in range(1, 401) if p[i - 1] <= 0.1 * i / 400)
    assert named.sum() == largest


def test_what_cannot_be_said() -> None:
    one = stability(scores()[:, :1], 3)
    assert np.isnan(one.frequency).all() and np.isnan(one.jaccard) and np.isnan(one.p_value).all() and np.isnan(one.q_value).all()
    silent = np.array([[0.0] * 6, [1.0, -1.0] * 3, [1.0] * 6, [np.nan] * 5 + [1.0]])
    np.testing.assert_allclose(stability(silent, 1).p_value, [np.nan, 1.0, 2.0**-5, np.nan])


def test_a_clear_ranking_is_stable_and_noise_is_not() -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((60, 20))
    clear = noise + np.where(np.arange(60) < 5, 20.0, 0.0)[:, None]
    assert stability(clear, 5).jaccard == 1.0 and stability(clear, 5).frequency.tolist() == [1.0] * 5 + [0.0] * 55
    assert stability(noise, 5).jaccard < 0.5
    assert "top 5 of two halves of the pairs share 1.00" in str(stability(clear, 5))
