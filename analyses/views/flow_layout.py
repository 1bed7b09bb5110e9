"""Where everything stands in the flow view: tables of nodes and edges become marks with coordinates, once, for the browser and for paper.

Tokens go along x, layers up y: embeddings at the bottom, then for each layer its heads and above them its MLP, logits on top.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analyses.views.markup import show_token

_COMPONENT = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)(?:\.(?P<read>[qkv]))?|\.mlp(?:\.(?P<mlp_read>in))?)")
_INPUTS = ("embed", "pos_embed", "bias")

SPACING = 27.0  # between the centres of two marks in one cell
RADIUS = 12.0
_SMALLEST_RADIUS = 2.5
_PER_LINE = 4  # marks side by side in one cell before a second line begins
_GAP = 20.0  # between two bands, for the edges to be seen
_GUTTER = 72.0  # for the names of the layers
_CHARACTER = 7.3
_LABEL_CHARACTERS = 11
_LABELLED = 16


@dataclass(frozen=True)
class Component:
    """What a name in a flow graph stands for. A reader (`L4H1.q`, `L4.mlp.in`) belongs to the component whose input it is."""

    name: str
    kind: str  # head, mlp, embed or logits
    layer: int | None
    order: int  # among the components of one band
    reader: str = ""


@dataclass
class Mark:
    """One drawn node: a component at a position. `score` is None where only edges name it."""

    name: str
    kind: str
    layer: int | None
    position: int
    score: float | None = None
    readers: dict[str, float] = field(default_factory=dict)
    details: Any = None
    x: float = 0.0
    y: float = 0.0
    r: float = 0.0
    order: int = 0
    labelled: bool = False


@dataclass(frozen=True)
class Link:
    """One drawn edge, from mark `source` to mark `target` (indices); `reader` is the input by which it enters."""

    source: int
    target: int
    score: float
    reader: str


@dataclass(frozen=True)
class Layout:
    """A flow graph with coordinates. `links` are sorted by |score|, strongest first; `dropped` were too many to draw."""

    tokens: list[str]
    marks: list[Mark]
    links: list[Link]
    dropped: int
    columns: list[float]
    bands: list[tuple[str, float]]
    width: float
    height: float


def parse_component(name: str) -> Component:
    """What `name` stands for; ValueError where it is not a name of the flow graph."""
    if name == "logits":
        return Component(name, "logits", None, 0)
    if name in _INPUTS:
        return Component(name, "embed", None, _INPUTS.index(name))
    match = _COMPONENT.fullmatch(name)
    if match is None:
        forms = "embed, pos_embed, bias, L3H5, L3H5.q (k, v), L3.mlp, L3.mlp.in, logits"
        raise ValueError(f"{name!r} is no component of a flow graph; names are {forms}")
    layer = int(match["layer"])
    if match["head"] is None:
        return Component(f"L{layer}.mlp", "mlp", layer, 0, match["mlp_read"] or "")
    return Component(f"L{layer}H{match['head']}", "head", layer, int(match["head"]), match["read"] or "")


def lay_out(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: Sequence[str], max_edges: int) -> Layout:
    """Place the nodes and route the strongest `max_edges` edges (columns as in `flow.flow_view`)."""
    marks: dict[tuple[str, int], Mark] = {}
    _add_nodes(marks, nodes, len(tokens))
    links = _links(marks, edges, len(tokens))
    links.sort(key=lambda link: -abs(link.score))
    columns, bands, width, height = _place(list(marks.values()), [show_token(token) for token in tokens])
    _label(list(marks.values()))
    return Layout(list(tokens), list(marks.values()), links[:max_edges], max(len(links) - max_edges, 0), columns, bands, width, height)


def curve(source: Mark, target: Mark) -> tuple[tuple[float, float], tuple[float, float]]:
    """The two control points of an edge's cubic Bezier curve. `flow.js` draws the same curve."""
    rise = target.y - source.y
    # An edge that stays in its column would run through the marks between its ends.
    bow = min(46.0, 0.1 * abs(rise)) if abs(target.x - source.x) < 1.5 * SPACING and abs(rise) > 2.5 * SPACING else 0.0
    return (source.x + bow, source.y + 0.4 * rise), (target.x + bow, target.y - 0.4 * rise)


def _add_nodes(marks: dict[tuple[str, int], Mark], nodes: pd.DataFrame, n_tokens: int) -> None:
    _need(nodes, ("node", "position", "score"), "nodes")
    for row in nodes.to_dict("records"):
        part = _component(row)
        score = _number(row["score"], f"the score of node {row['node']!r}")
        mark = _mark(marks, part, _position(row["position"], n_tokens, row["node"]))
        if part.reader:
            if part.reader in mark.readers:
                raise ValueError(f"nodes names {row['node']!r} at position {mark.position} twice; add the scores up first")
            mark.readers[part.reader] = score
            continue
        if mark.score is not None:
            raise ValueError(f"nodes names {row['node']!r} at position {mark.position} twice; add the scores up first")
        mark.score = score
        details = row.get("details")
        mark.details = None if details is None or (isinstance(details, float) and math.isnan(details)) else details


def _component(row: dict[Hashable, Any]) -> Component:
    """The row's component by its name; `kind` and `layer` speak for names that are not of the usual form."""
    name = str(row["node"])
    try:
        return parse_component(name)
    except ValueError:
        kind = row.get("kind")
        if kind not in ("head", "mlp", "embed", "logits"):
            raise
        layer = int(row["layer"]) if kind in ("head", "mlp") else None
        return Component(name, kind, layer, 1_000)


def _links(marks: dict[tuple[str, int], Mark], edges: pd.DataFrame, n_tokens: int) -> list[Link]:
    _need(edges, ("source", "target", "position", "score"), "edges")
    known = {mark.name: Component(mark.name, mark.kind, mark.layer, mark.order) for mark in marks.values()}
    has_source_position = "source_position" in edges.columns
    index = {key: i for i, key in enumerate(marks)}
    links = []
    for row in edges.to_dict("records"):
        name = f"{row['source']} -> {row['target']}"
        position = _position(row["position"], n_tokens, name)
        source_position = position
        if has_source_position and not pd.isna(row["source_position"]):
            source_position = _position(row["source_position"], n_tokens, name)
        ends = []
        for end, place in ((str(row["source"]), source_position), (str(row["target"]), position)):
            part = known.get(end) or parse_component(end)
            _mark(marks, part, place)
            ends.append((index.setdefault((part.name, place), len(index)), part.reader))
        links.append(Link(ends[0][0], ends[1][0], _number(row["score"], f"the score of edge {name}"), ends[1][1]))
    return links


def _mark(marks: dict[tuple[str, int], Mark], part: Component, position: int) -> Mark:
    return marks.setdefault((part.name, position), Mark(part.name, part.kind, part.layer, position, order=part.order))


def _place(marks: list[Mark], labels: list[str]) -> tuple[list[float], list[tuple[str, float]], float, float]:
    """Give every mark its x, y and r; returns column centres, bands with their y, width and height."""
    layers = max((mark.layer for mark in marks if mark.layer is not None), default=-1) + 1
    band_names = ["embed", *(name for layer in range(layers) for name in (f"L{layer} heads", f"L{layer} mlp")), "logits"]
    cells: dict[tuple[int, int], list[Mark]] = {}
    for mark in marks:
        cells.setdefault((_band(mark, layers), mark.position), []).append(mark)

    fullest = [max((len(cell) for (_, position), cell in cells.items() if position == column), default=0) for column in range(len(labels))]
    texts = [min(len(label), _LABEL_CHARACTERS) * _CHARACTER + 10 for label in labels]
    widths = [max(min(n, _PER_LINE) * SPACING + 8, text, 34.0) for n, text in zip(fullest, texts, strict=True)]
    columns = [_GUTTER + sum(widths[:i]) + widths[i] / 2 for i in range(len(widths))]

    lines = [max((-(-len(cell) // _PER_LINE) for (b, _), cell in cells.items() if b == band), default=0) for band in range(len(band_names))]
    heights = [max(n, 0.55) * SPACING for n in lines]
    height = sum(heights) + _GAP * (len(heights) + 1) + 2 * 18  # 18: a row of token labels below and above
    largest = max((abs(mark.score) for mark in marks if mark.score is not None and mark.kind != "logits"), default=0.0) or 1.0
    bands = []
    below = height - 18 - _GAP
    for band, name in enumerate(band_names):
        bands.append((name, below - heights[band] / 2))
        for (cell_band, position), cell in cells.items():
            if cell_band == band:
                _fill(cell, columns[position], below - heights[band] / 2, largest)
        below -= heights[band] + _GAP
    return columns, bands, _GUTTER + sum(widths) + 14, height


def _fill(cell: list[Mark], x: float, y: float, largest: float) -> None:
    cell.sort(key=lambda mark: mark.order)
    rows = [cell[i : i + _PER_LINE] for i in range(0, len(cell), _PER_LINE)]
    for line, row in enumerate(rows):
        for i, mark in enumerate(row):
            mark.x = x + (i - (len(row) - 1) / 2) * SPACING
            mark.y = y + ((len(rows) - 1) / 2 - line) * SPACING
            # The area is the score's; logits are the whole, so they set no scale.
            share = min(abs(mark.score) / largest, 1.0) if mark.score is not None else 0.0
            mark.r = round(_SMALLEST_RADIUS + (RADIUS - _SMALLEST_RADIUS) * math.sqrt(share), 2)


def _label(marks: list[Mark]) -> None:
    """The strongest heads and MLPs carry their names, except where a stronger one's name stands already."""
    ranked = sorted((mark for mark in marks if mark.score is not None and mark.layer is not None), key=lambda mark: -abs(mark.score or 0.0))
    placed: list[tuple[float, float]] = []
    for mark in ranked[:_LABELLED]:
        top = mark.y - mark.r
        if all(abs(mark.x - x) > 34 or abs(top - y) > 12 for x, y in placed):
            mark.labelled = True
            placed.append((mark.x, top))


def _band(mark: Mark, layers: int) -> int:
    if mark.kind == "embed":
        return 0
    if mark.kind == "logits" or mark.layer is None:
        return 2 * layers + 1
    return 1 + 2 * mark.layer + (mark.kind == "mlp")


def _need(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in frame.columns]:
        raise ValueError(f"{name} has no column {missing[0]!r}; it needs {', '.join(columns)} and has {', '.join(map(str, frame.columns))}")


def _position(value: Any, n_tokens: int, name: object) -> int:
    if pd.isna(value) or not 0 <= int(value) < n_tokens:
        raise ValueError(f"{name} is at position {value}, but the {n_tokens} tokens have positions 0 to {n_tokens - 1}")
    return int(value)


def _number(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; leave it out or look for the cause first")
    return number
