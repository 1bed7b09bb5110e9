"""Heat maps of signed numbers: a table in the browser, and the same in matplotlib, each with the numbers in its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.views.markup import decimals_of, format_number, round_significant, rounded, short
from analyses.views.page import View
from analyses.views.palette import INK, LINE, SIGNED, add_scale, limit_of, new_figure

# Beyond this many columns side by side the cells are too narrow to carry their number; hovering still shows it.
_NUMBERED_COLUMNS = 24


@dataclass(frozen=True)
class HeatMap:
    """One heat map: `values [rows, columns]`, signed, drawn from `-limit` (red) to `limit` (blue).

    `names` ([row][column]) says in words what a cell is; by default it is put together from the labels.
    """

    title: str
    values: np.ndarray
    rows: Sequence[str]
    columns: Sequence[str]
    row_name: str
    column_name: str
    limit: float
    names: Sequence[Sequence[str]] | None = None

    def name(self, row: int, column: int) -> str:
        """What a cell is, in words."""
        if self.names is not None:
            return self.names[row][column]
        return f"{self.row_name} {self.rows[row]}, {self.column_name} {self.columns[column]}"

    def number(self, row: int, column: int) -> str:
        """A cell's number, with as many decimals as the largest needs; nothing where it rounds to zero, so that the others are seen."""
        text = f"{self.values[row, column]:+.{decimals_of(self.limit)}f}"
        return text.replace("-", "−") if text.strip("+-0.") else ""

    @property
    def steep(self) -> bool:
        """Whether the columns' labels are too long to stand side by side."""
        return max(map(len, self.columns), default=0) > 3


def heat_map_view(title: str, maps: Sequence[HeatMap]) -> View:
    """Heat maps side by side as one picture; on a narrow screen one below the other."""
    numbered = sum(len(heat_map.columns) for heat_map in maps) <= _NUMBERED_COLUMNS
    props = {"maps": [_props(heat_map, numbered, len(maps) > 1) for heat_map in maps]}
    return View(title, lambda: _figure(maps, numbered), component="HeatMap", props=props)


def _props(heat_map: HeatMap, numbered: bool, titled: bool) -> dict[str, Any]:
    """What `views.js` makes a table of."""
    cells = [[(i, j) for j in range(len(heat_map.columns))] for i in range(len(heat_map.rows))]
    return {
        "title": heat_map.title,
        "titled": titled,
        "steep": heat_map.steep,
        "rows": list(heat_map.rows),
        "columns": list(heat_map.columns),
        "rowName": heat_map.row_name,
        "columnName": heat_map.column_name,
        "limit": round_significant(heat_map.limit),
        "values": rounded(heat_map.values),
        "numbers": [[heat_map.number(i, j) for i, j in row] for row in cells] if numbered else None,
        "tips": [[f"{heat_map.name(i, j)}\n{format_number(heat_map.values[i, j], digits=4)}" for i, j in row] for row in cells],
    }


def _figure(maps: Sequence[HeatMap], numbered: bool) -> Figure:
    cell = 0.4 if numbered else 0.28
    widths = [max(len(heat_map.columns) * cell + 1.1, 2.0) for heat_map in maps]
    height = max(max(len(heat_map.rows) for heat_map in maps) * 0.26 + 1.0, 1.6)
    figure = new_figure(min(sum(widths) + 0.6, 16.0), min(height, 14.0))
    axes = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for axis, heat_map in zip(axes, maps, strict=True):
        _draw(axis, heat_map, numbered)
        if len(maps) > 1:
            axis.set_title(heat_map.title, fontsize=9, fontweight="bold", loc="left")
    add_scale(figure, largest_limit([np.array([heat_map.limit]) for heat_map in maps]))
    return figure


def _draw(axis: Axes, heat_map: HeatMap, numbered: bool) -> None:
    rows, columns = heat_map.values.shape
    # Pale lines around every cell: a row of zeros is seen as one.
    axis.pcolormesh(heat_map.values, cmap=SIGNED, vmin=-heat_map.limit, vmax=heat_map.limit, edgecolors=LINE, linewidth=0.5)
    axis.set(xlim=(-0.02, columns + 0.02), ylim=(rows + 0.02, -0.02))
    axis.set_xlabel(heat_map.column_name, fontsize=8)
    axis.set_ylabel(heat_map.row_name, fontsize=8)
    turned: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if heat_map.steep else {}
    axis.set_xticks(np.arange(columns) + 0.5, [short(label, 16) for label in heat_map.columns], fontsize=8, **turned)
    axis.set_yticks(np.arange(rows) + 0.5, [short(label, 24) for label in heat_map.rows], fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if not numbered:
        return
    for (i, j), value in np.ndenumerate(heat_map.values):
        ink = "white" if abs(value) > 0.6 * heat_map.limit else INK
        axis.text(j + 0.5, i + 0.5, heat_map.number(i, j), ha="center", va="center", fontsize=6.5, color=ink)


def largest_limit(maps: Sequence[np.ndarray]) -> float:
    """One scale for several maps of the same quantity."""
    return limit_of(np.concatenate([np.ravel(values) for values in maps]))
