"""How far a method puts heads of a known role before the others, with bootstrap intervals over examples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from analyses.circuits.recovery import area_under_roc
from analyses.evaluation.agreement import correlation

Array = np.ndarray
RESAMPLES = 2000


def ranking_table(
    scores: dict[str, Array], known: Sequence[tuple[int, int]], role: Array, *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """One row per method and reading of its scores.

    A head's score is the mean over examples. `signed` ranks it as it is, `absolute` ranks the mean of the examples' magnitudes.

    Args:
        scores: [example, layer, head] by method.
        known: heads (layer, head) whose role is known.
        role: [layer, head], how much each head does what the role says; NaN-free.
        resamples: of the examples, for the intervals (95 %, percentiles).

    Returns:
        Columns method, reading, auroc (of the known heads among all; 0.5 is chance) with low and high, rank (the median over the known
        heads, 1 is first), rank_high (95th percentile over resamples), role (Spearman's correlation with `role` over all heads) with
        role_low and role_high, and patching (the same with the mean of noising and denoising, magnitudes on both sides).
    """
    n = len(next(iter(scores.values())))
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples) / n
    weights = np.concatenate([np.full((1, n), 1 / n), weights])  # the sample itself first
    flat = {name: one.reshape(n, -1) for name, one in scores.items()}
    truth = np.zeros(role.shape, dtype=bool)
    truth[tuple(np.array(known).T)] = True
    patched = np.abs(weights @ ((flat["noising"] + flat["denoising"]) / 2))
    rows = []
    for name, values in flat.items():
        readings = {"signed": weights @ values, "absolute": weights @ np.abs(values)}
        if (values >= 0).all():
            del readings["absolute"]  # the same
        for reading, means in readings.items():
            places = rankdata(-means, axis=1)
            areas, ranks = area_under_roc(means, truth.ravel()), np.median(places[:, truth.ravel()], axis=1)
            with_role = correlation(rankdata(means, axis=1), np.broadcast_to(rankdata(role.ravel()), means.shape))
            with_patching = correlation(rankdata(np.abs(means), axis=1), rankdata(patched, axis=1))
            rows.append(
                {
                    "method": name,
                    "reading": reading,
                    "auroc": areas[0],
                    "low": np.percentile(areas[1:], 2.5),
                    "high": np.percentile(areas[1:], 97.5),
                    "rank": ranks[0],
                    "rank_high": np.percentile(ranks[1:], 95),
                    "role": with_role[0],
                    "role_low": np.nanpercentile(with_role[1:], 2.5) if np.isfinite(with_role[1:]).any() else np.nan,
                    "role_high": np.nanpercentile(with_role[1:], 97.5) if np.isfinite(with_role[1:]).any() else np.nan,
                    "patching": with_patching[0],
                }
            )
    return pd.DataFrame(rows)
