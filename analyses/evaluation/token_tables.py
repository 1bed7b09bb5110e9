"""An evaluation of token relevance as it is shown, in the terminal and on pages."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.evaluation.token_relevance import MEASURES, UNCHANGED, TokenEvaluation

WORDS = {
    "saco": "SaCo",
    "faithfulness_correlation": "faithfulness",
    "comprehensiveness": "comprehensive",
    "sufficiency": "sufficient",
    "plausibility": "AUPRC",
}
READING = (
    "SaCo, faithfulness (correlation), comprehensive(ness) and AUPRC (plausibility): high is good; sufficient (sufficiency): low is good. "
    "Passes: forward + backward."
)


def measures_frame(found: TokenEvaluation, between: str = " ") -> pd.DataFrame:
    """A row per method, the one with the highest SaCo first: measures with their intervals, and what an explanation costs.

    Args:
        between: what stands between a mean and its interval.
    """
    table = found.table.sort_values("saco", ascending=False, kind="stable")
    shown = {"method": table["method"].tolist()}
    for name in MEASURES:
        if table[name].notna().any():
            cells = table[[name, f"{name}_low", f"{name}_high"]].to_numpy().tolist()
            shown[WORDS[name]] = [with_interval(*cell, between=between) for cell in cells]
    shown["passes"] = [f"{row.forwards:.3g} + {row.backwards:.3g}" for row in table.itertuples()]
    shown["seconds"] = [f"{seconds:.2g}" for seconds in table["processor_seconds"]]
    return pd.DataFrame(shown)


def randomised_frame(found: TokenEvaluation, kind: str) -> pd.DataFrame:
    """A row per method: Spearman with the model's own scores, for each part that is random; with `kind` "cascading" and all above it.

    The last column of "cascading", all weights, is shown with its interval.
    """
    rows = found.randomised[found.randomised["kind"] == kind]
    whole = (rows["part"] == rows["part"].iloc[-1]) & (kind == "cascading")
    values = rows[["spearman", "low", "high"]].astype(float).where(whole.to_numpy()[:, None] | np.array([True, False, False]))
    cells = [with_interval(*row) for row in values.to_numpy().tolist()]
    wide = rows.assign(cell=cells).pivot(index="method", columns="part", values="cell")
    return wide.loc[rows["method"].unique(), rows["part"].unique()].reset_index().rename_axis(columns=None)


def notes(found: TokenEvaluation) -> list[str]:
    """Sentences that belong under the tables."""
    lines = [READING, *(f"{name} is left out: {reason}" for name, reason in found.left_out.items())]
    if found.chance == found.chance:
        lines.append(f"{found.chance:.1%} of the tokens are evidence.")
    if len(found.randomised):
        named = ", ".join(found.unchanged) or "none"
        lines.append(f"Much the same with all weights random (Spearman {UNCHANGED} or more), so they do not explain this model: {named}.")
        whole = found.after_randomisation
        if unknown := whole.loc[whole["spearman"].isna(), "method"].tolist():
            lines.append(f"Not known of {', '.join(unknown)}: with all weights random the scores are not finite, or all the same.")
    return lines


def with_interval(mean: float, low: float, high: float, *, between: str = " ") -> str:
    """Mean and interval in a cell."""
    if mean != mean:
        return "–"
    return f"{mean:.2f}" if low != low else f"{mean:.2f}{between}({low:.2f} to {high:.2f})"
