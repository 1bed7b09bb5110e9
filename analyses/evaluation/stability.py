"""Whether a ranking would come out the same on other pairs: bootstrap, split halves, and a sign-flip test with false-discovery control.

Nothing here says whether an estimate is right: it says whether the pairs are many enough for the order that it gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.stats import false_discovery_control

from analyses.evaluation.agreement import bootstrap_weights, weighted_means

Array = np.ndarray

RESAMPLES, SPLITS, FLIPS = 100, 20, 1000
_SILENT = 1e-6  # of the largest sum: rounding of patched runs


@dataclass(frozen=True)
class Stability:
    """What resampling of the pairs does to a ranking by magnitude.

    Attributes:
        k: size of the top.
        frequency: share of bootstrap resamples of the pairs in which a component is among the k largest magnitudes, [component].
        jaccard: |A and B| / |A or B| of the top k found on two halves of the pairs, mean over random halves.
        p_value: of the paired sign-flip test that the mean score is 0, [component].
        q_value: the smallest false-discovery rate at which a component counts as different from 0 (Benjamini & Hochberg 1995), [component].
    """

    k: int
    frequency: Array
    jaccard: float
    p_value: Array
    q_value: Array

    def __str__(self) -> str:
        return (
            f"top {self.k} of two halves of the pairs share {self.jaccard:.2f} (Jaccard, mean of {SPLITS} splits); "
            f"{int((self.frequency >= 0.9).sum())} are in the top {self.k} of at least 90 % of resamples; "
            f"{int((self.q_value <= 0.05).sum())} of {int((~np.isnan(self.q_value)).sum())} differ from 0 (false-discovery rate 5 %)"
        )


class Weights(NamedTuple):
    """How much each pair counts.

    Attributes:
        resamples: how often it is drawn in each bootstrap resample, [resample, pair].
        halves: 1 where it is in a half, [2 * split, pair]: of each split both halves, one after the other.
        signs: 1 or -1, [flip, pair], the first row being what was seen.
    """

    resamples: Array
    halves: Array
    signs: Array


def resampling_weights(n: int, *, seed: int = 0) -> Weights:
    """Bootstrap resamples, random halves and random signs of n pairs; all there are of the signs, if these are few."""
    rng = np.random.default_rng(seed + 1)
    first = np.zeros((SPLITS, n))
    for row in first:
        row[rng.permutation(n)[: n // 2]] = 1.0
    halves = np.stack([first, 1.0 - first], 1).reshape(2 * SPLITS, n)
    if 2**n <= FLIPS:
        signs = np.array(list(product((1.0, -1.0), repeat=n)))
    else:
        signs = np.concatenate([np.ones((1, n)), rng.choice((-1.0, 1.0), size=(FLIPS - 1, n))])
    return Weights(bootstrap_weights(n, RESAMPLES, seed=seed), halves, signs)


def stability(scores: Array, k: int, *, seed: int = 0) -> Stability:
    """Stability of the k largest magnitudes.

    Args:
        scores: [component, pair], NaN where a pair has no such component. Fewer than two pairs give NaN.
        k: size of the top.
    """
    weights = resampling_weights(scores.shape[1], seed=seed)
    resampled, halves = (weighted_means(scores, rows) for rows in weights[:2])
    flipped = weights.signs @ np.nan_to_num(scores).T
    return from_sums(resampled, halves, np.where((~np.isnan(scores)).sum(1) >= 2, flipped, np.nan), k)


def from_sums(resampled: Array, halves: Array, flipped: Array, k: int) -> Stability:
    """Stability from the means of each resample and half, and from the sums under each choice of signs, [row, component]."""
    p_value = sign_flip_p_values(flipped)
    there, q_value = ~np.isnan(p_value), np.full_like(p_value, np.nan)
    if there.any():
        q_value[there] = false_discovery_control(p_value[there])
    if np.isnan(flipped).all():  # of a single pair there are no halves
        return Stability(k, q_value, float("nan"), p_value, q_value)
    tops = top_sets(halves, k)
    both, either = (tops[::2] & tops[1::2]).sum(1), (tops[::2] | tops[1::2]).sum(1)
    return Stability(k, top_sets(resampled, k).mean(0), float((both / either).mean()), p_value, q_value)


def top_sets(values: Array, k: int) -> Array:
    """True at the k largest magnitudes of each row; what is NaN comes last."""
    order = np.argsort(-np.nan_to_num(np.abs(values), nan=-1.0), axis=1, kind="stable")[:, :k]
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def sign_flip_p_values(flipped: Array) -> Array:
    """Two-sided p-values of the paired sign-flip test that a mean is 0, [component].

    Were there no effect, each pair's score could as well have had the other sign. The p-value is the share of choices of signs whose sum is
    at least as far from 0 as the one that was seen; NaN where the sums are, and where every choice gives next to nothing: what does nothing
    on any pair is no hypothesis to test.

    Args:
        flipped: sums under each choice of signs, [flip, component], as seen in the first row.
    """
    sums = np.abs(flipped)
    share = (sums >= sums[0] * (1 - 1e-9)).mean(0)
    silent = sums.max(0) <= _SILENT * np.nan_to_num(sums).max(initial=0.0)
    return np.where(np.isnan(sums[0]) | silent, np.nan, share)
