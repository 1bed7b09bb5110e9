"""Scores with their intervals, as bars: how far each can be trusted, and where patching lies."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.views.markup import table_html
from analyses.views.page import View
from analyses.views.palette import INK, LINE, NEGATIVE, POSITIVE, new_figure
from lens_relevance.errors import RelevanceError

_COLUMNS = ("name", "score", "low", "high", "reliable")
_SHOWN = 20


def interval_view(frame: pd.DataFrame, *, title: str = "Scores and their intervals") -> View:
    """One row per component, strongest first: its interval as a bar, its score as a dot, and a ring where patching measured it.

    Args:
        frame: columns name, score, low, high and reliable; patching (NaN where it was not measured) may be there too. The 20 largest
            magnitudes of score or patching are drawn, all are in the table.

    Raises:
        RelevanceError: a column is missing, or there are no rows.
    """
    if missing := [name for name in _COLUMNS if name not in frame.columns]:
        raise RelevanceError(f"the table has no column {missing[0]!r}; it has {list(map(str, frame.columns))}")
    if frame.empty:
        raise RelevanceError("there are no scores to draw")
    sizes = frame[["score", *(["patching"] if "patching" in frame else [])]].abs().max(axis=1)
    shown = frame.loc[sizes.sort_values(ascending=False, kind="stable").index]
    note = f"<details><summary>The numbers</summary>{table_html(shown.reset_index(drop=True))}</details>"
    return View(title, lambda: _figure(shown.head(_SHOWN)), note=note)


def _figure(frame: pd.DataFrame) -> Figure:
    figure = new_figure(5.8, 0.24 * len(frame) + 1.1)
    axis = figure.add_subplot()
    rows = np.arange(len(frame))[::-1]
    reliable = frame["reliable"].to_numpy(bool)
    axis.axvline(0, color=LINE, linewidth=0.8, zorder=0)
    for sure, colour, label in ((True, POSITIVE, "reliable"), (False, NEGATIVE, "flagged: the interval is wide")):
        chosen = reliable == sure
        if not chosen.any():
            continue
        part, at = frame[chosen], rows[chosen]
        axis.barh(at, part["high"] - part["low"], left=part["low"], height=0.55, color=colour, alpha=0.3, linewidth=0, label=label)
        axis.scatter(part["score"], at, s=16, color=colour, zorder=3)
    if "patching" in frame:
        axis.scatter(frame["patching"], rows, s=34, facecolors="none", edgecolors=INK, linewidths=1.1, zorder=4, label="patching")
    axis.set_yticks(rows, list(frame["name"]))
    axis.set(xlabel="score", ylim=(-0.7, len(frame) - 0.3))
    figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8, handlelength=1.6)
    return figure
