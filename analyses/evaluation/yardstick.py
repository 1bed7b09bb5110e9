"""Whether activation patching itself can be trusted as a yardstick for single components, on these pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from analyses.components import COMPONENTS
from analyses.evaluation.agreement import correlation, mean_over_pairs
from analyses.evaluation.stability import FLIPS, stability

Array = np.ndarray

COLUMNS = ("component", "n", "sum_over_gap", "directions", "above_noise", "near_zero")
RATE = 0.05
_NEAR_ZERO = 0.01
_FEW = 3


def yardstick_table(
    effects: Mapping[str, Array], directions: Mapping[str, tuple[Array, Array]], gap: float, *, n_layers: int, top_k: int = 10
) -> pd.DataFrame:
    """A row per kind of component, with what tells a sound yardstick from a broken one.

    Args:
        effects: effects [component, pair] of each kind, layer by layer; NaN where a pair has no such component.
        directions: denoising and noising apart, where both were patched.
        gap: mean of m(clean) - m(corrupt).

    Returns:
        component; n; sum_over_gap (sum of the single effects over the gap; of the residual stream the mean over layers, as each layer
        holds everything); directions (Pearson's correlation of denoising with noising over components, NaN where one was patched);
        above_noise (components whose effect differs from 0 at a false-discovery rate of 5 %, NaN where the pairs are too few to tell
        three of them); near_zero (share of components whose effect is below 1 % of the largest).
    """
    rows = []
    for name, values in effects.items():
        mean = mean_over_pairs(values)
        mean = mean[~np.isnan(mean)]
        total = mean.sum() / (n_layers if name == "resid" else 1)
        tested = stability(values, top_k).q_value
        smallest = max(2.0 ** (1 - values.shape[1]), 1 / FLIPS)  # p-value that there can be
        can_tell = values.shape[1] > 1 and smallest * (~np.isnan(tested)).sum() <= _FEW * RATE
        rows.append(
            {
                "component": name,
                "n": len(mean),
                "sum_over_gap": float(total / gap) if gap else float("nan"),
                "directions": float(correlation(*(mean_over_pairs(x)[None] for x in directions[name]))[0])
                if name in directions
                else np.nan,
                "above_noise": float((tested <= RATE).sum()) if can_tell else float("nan"),
                "near_zero": float((np.abs(mean) < _NEAR_ZERO * np.abs(mean).max(initial=0.0)).mean()) if len(mean) else float("nan"),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def yardstick_warnings(table: pd.DataFrame, gap: float, gap_error: float) -> list[str]:
    """Plain sentences on what makes the yardstick doubtful; none where nothing does.

    Args:
        table: as of `yardstick_table`.
        gap: mean of m(clean) - m(corrupt), and its standard error.
    """
    found = []
    if not abs(gap) > 2 * gap_error and not np.isnan(gap_error):
        found.append(
            f"the metric hardly differs between clean and corrupt ({gap:.3g}, standard error {gap_error:.3g}): there is nothing to "
            "explain, and no method can agree with effects that cancel"
        )
    for row in table.to_dict("records"):
        name, directions, share, above = row["component"], float(row["directions"]), float(row["sum_over_gap"]), float(row["above_noise"])
        label = COMPONENTS[name].label
        if directions < 0.5:
            found.append(
                f"{label}: denoising and noising disagree (correlation {directions:.2f}), as where several components are "
                "needed together or can replace each other: the mean of both cannot be trusted as a yardstick; compare with one direction"
            )
        if name == "resid" and not 0.5 <= share <= 2:
            found.append(
                f"{label}: single positions add up to {share:.2f} of the gap, where whole layers hold all of it: the positions "
                "act together, and a single patch says little about their shares"
            )
        if above < _FEW:
            found.append(
                f"{label}: {above:.0f} of {row['n']} effects are above noise: a correlation over them is one of chance; take more pairs"
            )
    if table["above_noise"].isna().any():
        names = ", ".join(COMPONENTS[name].label for name in table.loc[table["above_noise"].isna(), "component"])
        found.append(f"{names}: the pairs are too few to tell effects from noise; take more")
    return found
