"""How well estimates agree with a yardstick, over components: correlation, signs, top sets, magnitudes, each with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

Array = np.ndarray

# Effects below this share of the largest are rounding or chance: their sign says nothing.
_SIGN_FLOOR = 0.01


@dataclass(frozen=True)
class Agreement:
    """Agreement of two score vectors over components.

    Attributes:
        pearson, spearman: correlation; NaN where a side is constant.
        sign_agreement: share of components with the same sign, among those whose effect is at least 1 % of the largest.
        top_k_overlap: share of the k largest magnitudes that both have.
        magnitude_error: sum of |estimate - effect| over sum of |effect| (0 is best; a wrong scale shows here and not in the correlations).
    """

    pearson: float
    spearman: float
    sign_agreement: float
    top_k_overlap: float
    magnitude_error: float


def agreement(estimate: Array, effect: Array, top_k: int) -> Agreement:
    """Agreement of `estimate` with `effect`, both [component]."""
    seen = np.abs(effect) >= _SIGN_FLOOR * np.abs(effect).max(initial=0.0)
    seen &= effect != 0
    total = np.abs(effect).sum()
    top = [set(np.argsort(-np.abs(values), kind="stable")[:top_k].tolist()) for values in (estimate, effect)]
    return Agreement(
        pearson=float(correlation(estimate[None], effect[None])[0]),
        spearman=float(rank_correlation(estimate[None], effect[None])[0]),
        sign_agreement=float((np.sign(estimate[seen]) == np.sign(effect[seen])).mean()) if seen.any() else float("nan"),
        top_k_overlap=len(top[0] & top[1]) / len(top[0]),
        magnitude_error=float(np.abs(estimate - effect).sum() / total) if total else float("nan"),
    )


def intervals(estimates: Array, effects: Array, resamples: int, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of Pearson and Spearman: pairs are drawn with replacement, scores averaged anew, correlations taken.

    Args:
        estimates, effects: [component, pair], NaN where a pair has no such component.
        resamples: how often pairs are drawn.

    Returns:
        (low, high) by the name of the correlation; NaN for fewer than two pairs.
    """
    n = estimates.shape[1]
    if n < 2 or resamples < 1:
        return {name: (float("nan"), float("nan")) for name in ("pearson", "spearman")}
    drawn = bootstrap_weights(n, resamples, seed=seed)
    means = [weighted_means(values, drawn) for values in (estimates, effects)]
    correlations = {"pearson": correlation(*means), "spearman": correlation(*map(_ranks, means))}
    return {
        name: tuple(np.nanpercentile(values, [2.5, 97.5]).tolist()) if np.isfinite(values).any() else (float("nan"),) * 2
        for name, values in correlations.items()
    }


def bootstrap_weights(n: int, resamples: int, *, seed: int = 0) -> Array:
    """How often each pair is drawn in each bootstrap resample, [resample, pair]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def correlation_in_words(value: float) -> str:
    """A correlation for tables and text: three decimals, or that it is undefined."""
    return "undefined" if np.isnan(value) else f"{value:.3f}"


def mean_over_pairs(scores: Array) -> Array:
    """[component, pair] -> [component], over the pairs that have the component; NaN where none has."""
    return weighted_means(scores, np.ones((1, scores.shape[1])))[0]


def correlation(x: Array, y: Array) -> Array:
    """Pearson's correlation row by row, [row, component] -> [row]; what is missing on either side is left out, NaN for a constant row."""
    missing = np.isnan(x) | np.isnan(y)
    count = (~missing).sum(1, keepdims=True)
    x, y = (np.where(missing, 0.0, values) for values in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (np.where(missing, 0.0, values - values.sum(1, keepdims=True) / count) for values in (x, y))
        scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
        return np.where(scale > 0, (x * y).sum(1) / scale, np.nan)


def rank_correlation(x: Array, y: Array) -> Array:
    """Spearman's correlation row by row, [row, component] -> [row]; where a component is missing it has to be missing on both sides."""
    return correlation(_ranks(x), _ranks(y))


def mean_with_interval(values: Array, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of values [n], and its 95 % bootstrap interval; what is NaN is left out. NaN for no value, no interval for a single one."""
    there = values[~np.isnan(values)]
    if not len(there):
        return (float("nan"),) * 3
    if len(there) == 1:
        return float(there[0]), float("nan"), float("nan")
    drawn = weighted_means(there[None], bootstrap_weights(len(there), resamples, seed=seed))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(there.mean()), float(low), float(high)


def weighted_means(scores: Array, weights: Array) -> Array:
    """Means [row, component] of scores [component, pair] under weights [row, pair]."""
    there = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        return (weights @ np.where(there, scores, 0.0).T) / (weights @ there.T.astype(float))


def _ranks(values: Array) -> Array:
    return rankdata(values, axis=1, nan_policy="omit")
