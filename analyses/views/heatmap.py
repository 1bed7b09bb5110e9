"""Heat maps of signed numbers: an HTML table with the numbers in it, and the same in matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analyses.views.markup import escape, format_number, short
from analyses.views.page import View
from analyses.views.palette import SIGNED, add_scale, limit_of, new_figure

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


def heat_map_view(title: str, maps: Sequence[HeatMap]) -> View:
    """Heat maps side by side as one picture; on a narrow screen one below the other."""
    numbered = sum(len(heat_map.columns) for heat_map in maps) <= _NUMBERED_COLUMNS
    body = f'<div class="lr-heats">{"".join(_table(heat_map, numbered, len(maps) > 1) for heat_map in maps)}</div>'
    return View(title, lambda: _figure(maps), body=body, component="HeatMap")


def _table(heat_map: HeatMap, numbered: bool, titled: bool) -> str:
    long_labels = max((len(label) for label in heat_map.columns), default=0) > 3
    heads = "".join(f'<th scope="col"><span>{escape(label)}</span></th>' for label in heat_map.columns)
    rows = []
    for i, label in enumerate(heat_map.rows):
        cells = "".join(_cell(heat_map, i, j, numbered) for j in range(len(heat_map.columns)))
        rows.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    caption = f"<caption>{escape(heat_map.title)}</caption>" if titled else ""
    classes = "lr-heat" + (" lr-steep" if long_labels else "") + (" lr-numbered" if numbered else "")
    corner = f'<th class="lr-corner">{escape(heat_map.column_name)} →<br>{escape(heat_map.row_name)} ↓</th>'
    return (
        f'<div class="lr-scroll"><table class="{classes}" aria-label="{escape(heat_map.title)}">{caption}'
        f"<thead><tr>{corner}{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(heat_map: HeatMap, row: int, column: int, numbered: bool) -> str:
    value = float(heat_map.values[row, column])
    strength = min(abs(value) / heat_map.limit, 1.0)
    classes = ("lr-neg" if value < 0 else "lr-pos") + (" lr-strong" if strength > 0.6 else "")
    tip = f"{heat_map.name(row, column)}\n{format_number(value, digits=4)}"
    number = f"<span>{value:+.{_decimals(heat_map.limit)}f}</span>" if numbered else ""
    return f'<td class="{classes}" style="--v:{strength:.3f}" data-value="{value:.6g}" title="{escape(tip)}">{number}</td>'


def _decimals(limit: float) -> int:
    """Decimals that leave two or three digits of the largest number, the same in every cell."""
    magnitude = math.floor(math.log10(limit))
    return min(max(1 - magnitude, 0), 8) if magnitude < -1 or magnitude > 0 else 2


def _figure(maps: Sequence[HeatMap]) -> Figure:
    widths = [max(len(heat_map.columns) * 0.28 + 1.1, 2.4) for heat_map in maps]
    height = max(max(len(heat_map.rows) for heat_map in maps) * 0.26 + 1.1, 2.2)
    figure = new_figure(min(sum(widths) + 0.6, 16.0), min(height, 14.0))
    axes = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for axis, heat_map in zip(axes, maps, strict=True):
        _draw(figure, axis, heat_map)
    return figure


def _draw(figure: Figure, axis: Axes, heat_map: HeatMap) -> None:
    axis.imshow(heat_map.values, cmap=SIGNED, vmin=-heat_map.limit, vmax=heat_map.limit, aspect="auto", interpolation="nearest")
    axis.set_title(heat_map.title)
    axis.set_xlabel(heat_map.column_name)
    axis.set_ylabel(heat_map.row_name)
    steep = max((len(label) for label in heat_map.columns), default=0) > 3
    axis.set_xticks(
        range(len(heat_map.columns)),
        [short(label, 16) for label in heat_map.columns],
        rotation=60 if steep else 0,
        ha="right" if steep else "center",
    )
    if steep:
        for label in axis.get_xticklabels():
            label.set_rotation_mode("anchor")
    axis.set_yticks(range(len(heat_map.rows)), [short(label, 24) for label in heat_map.rows])
    axis.tick_params(length=0)
    add_scale(figure, axis, heat_map.limit)


def largest_limit(maps: Sequence[np.ndarray]) -> float:
    """One scale for several maps of the same quantity."""
    return limit_of(np.concatenate([np.ravel(values) for values in maps]))
