"""Where everything stands in the flow view: tokens along x, layers up y, fitted into a given size. `flow_layout.js` computes the same.

Rows and columns in which nothing is drawn take no room: layers without a mark are left out, runs of tokens without one become a narrow gap
where the page is short of room. Where there are more rows than fit, neighbouring layers share one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analyses.views.flow_marks import Mark

RADIUS = 12.0
SMALLEST_RADIUS = 2.5
GUTTER = 76.0  # for the names of the rows
MARGIN = 18.0  # right of the last column
TOP, BOTTOM = 16.0, 34.0  # the tokens' labels stand below
SPACING = 26.0  # between two marks of one cell: what a column asks for
WIDEST_SPACING = 58.0  # and what it takes where there is room, so that names fit
LEAST_ROW = 11.0
GAP = 20.0  # a run of tokens without a mark
CHARACTER = 7.3
LABEL_CHARACTERS = 11


@dataclass(frozen=True)
class Column:
    """One token, or a run of tokens without marks. centre and width are pixels; position: the first token, count: how many."""

    position: int
    count: int
    centre: float
    width: float


@dataclass(frozen=True)
class Row:
    """One row of marks, by name (`L3 heads`, `L4-7 mlp`); y is its centre in pixels."""

    name: str
    y: float


@dataclass(frozen=True)
class Placement:
    """marks: index of a mark -> (x, y, r) in pixels, of those drawn."""

    marks: dict[int, tuple[float, float, float]]
    columns: list[Column]
    rows: list[Row]
    width: float | int
    height: float | int


def place(marks: Sequence[Mark], drawn: Sequence[int], labels: Sequence[str], *, width: float | int, height: float | int) -> Placement:
    """Places of the marks `drawn` (indices) in a picture of this size, labels: one per token."""
    rows, row_of = _rows([marks[i] for i in drawn], height)
    step = (height - TOP - BOTTOM) / max(len(rows), 1)
    cells: dict[tuple[int, int], list[int]] = {}
    for i in drawn:
        cells.setdefault((row_of[marks[i].kind, marks[i].layer], marks[i].position), []).append(i)
    fullest = [0] * len(labels)
    for (_, position), cell in cells.items():
        fullest[position] = max(fullest[position], len(cell))
    columns = _columns(fullest, labels, width)
    centres = {column.position: column for column in columns if fullest[column.position]}
    largest = max((abs(m.score) for m in (marks[i] for i in drawn) if m.score is not None and m.kind != "logits"), default=0.0) or 1.0
    placed: dict[int, tuple[float, float, float]] = {}
    for (row, position), cell in cells.items():
        cell.sort(key=lambda i: (marks[i].layer or 0, marks[i].order))
        column = centres[position]
        spacing = min(WIDEST_SPACING, column.width / len(cell))
        # Half of a row's height at most, so that marks of neighbouring rows stay apart.
        radius = max(min(RADIUS, 0.46 * step, 0.48 * max(spacing, 7.0)), SMALLEST_RADIUS)
        y = height - BOTTOM - (row + 0.5) * step
        for n, i in enumerate(cell):
            score = marks[i].score
            share = 0.0 if score is None else min(abs(score) / largest, 1.0)  # logits are the whole and set no scale
            size = SMALLEST_RADIUS + (radius - SMALLEST_RADIUS) * math.sqrt(share)
            placed[i] = (column.centre + (n - (len(cell) - 1) / 2) * spacing, y, size)
    named = [Row(name, height - BOTTOM - (n + 0.5) * step) for n, name in enumerate(rows)]
    return Placement(placed, columns, named, width, height)


def _rows(marks: Sequence[Mark], height: float | int) -> tuple[list[str], dict[tuple[str, int | None], int]]:
    """Names of the rows from below, and the row of each (kind, layer)."""
    found = {(m.kind, m.layer) for m in marks}
    layers = sorted({layer for _, layer in found if layer is not None})
    n_rows = len(found)
    together = max(1, math.ceil(n_rows * LEAST_ROW / max(height - TOP - BOTTOM, 1.0)))  # layers that share a row
    groups = [layers[i : i + together] for i in range(0, len(layers), together)]
    names: list[str] = []
    row_of: dict[tuple[str, int | None], int] = {}

    def add(name: str, members: list[tuple[str, int | None]]) -> None:
        here = [member for member in members if member in found]
        if here:
            row_of.update(dict.fromkeys(here, len(names)))
            names.append(name)

    add("embed", [("embed", None)])
    for group in groups:
        label = f"L{group[0]}" if len(group) == 1 else f"L{group[0]}–{group[-1]}"
        add(f"{label} stream", [("early stream", layer) for layer in group])
        add(f"{label} features", [(kind, layer) for layer in group for kind in ("early feature", "early error")])
        add(f"{label} heads", [("head", layer) for layer in group])
        add(f"{label} stream", [("middle stream", layer) for layer in group])
        add(f"{label} mlp", [("mlp", layer) for layer in group])
        add(f"{label} features", [(kind, layer) for layer in group for kind in ("feature", "error")])
        add(f"{label} stream", [("late stream", layer) for layer in group])
    add("logits", [("logits", None)])
    return names, row_of


def _columns(fullest: Sequence[int], labels: Sequence[str], width: float | int) -> list[Column]:
    """All tokens where they fit; otherwise runs of tokens without marks as gaps. What is left over goes where most marks are."""
    texts = [min(len(label), LABEL_CHARACTERS) * CHARACTER + 10 for label in labels]
    room = width - GUTTER - MARGIN
    needed = [max(text, n * SPACING + 8) if n else text for n, text in zip(fullest, texts, strict=True)]
    units = [(i, 1, needed[i]) for i in range(len(labels))]
    if sum(needed) > room:
        units, i = [], 0
        while i < len(labels):
            count = 1
            if not fullest[i]:
                while i + count < len(labels) and not fullest[i + count]:
                    count += 1
                units.append((i, count, GAP))
            else:
                units.append((i, 1, needed[i]))
            i += count
    natural = sum(size for *_, size in units)
    weights = [float(fullest[i]) for i, *_ in units]
    if natural > room:
        widths = [size * room / natural for *_, size in units]
    else:
        spare, total = room - natural, sum(weights) or 1.0
        widths = [size + spare * weight / total for (*_, size), weight in zip(units, weights, strict=True)]
    columns, left = [], GUTTER
    for (position, count, _), size in zip(units, widths, strict=True):
        columns.append(Column(position, count, left + size / 2, size))
        left += size
    return columns


def curve(source: tuple[float, float], target: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two control points of an edge's cubic Bezier curve between two points."""
    rise = target[1] - source[1]
    # An edge that stays in its column would run through the marks between its ends.
    bow = min(46.0, 0.1 * abs(rise)) if abs(target[0] - source[0]) < 1.5 * SPACING and abs(rise) > 2.5 * SPACING else 0.0
    # An edge inside one row (a head that reads another position) bends, so that the edges over the same stretch can be told apart.
    sag = min(30.0, 0.12 * abs(target[0] - source[0])) if abs(rise) < 1.0 else 0.0
    return (source[0] + bow, source[1] + 0.4 * rise + sag), (target[0] + bow, target[1] - 0.4 * rise + sag)
