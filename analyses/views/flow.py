"""The flow view: relevance flowing through a model as a graph over tokens and layers, to be explored in a browser or printed in a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from torch import Tensor

from analyses.views.flow_layout import Layout, curve, lay_out
from analyses.views.markup import round_significant, short, show_token
from analyses.views.page import Page, View
from analyses.views.palette import INK, LINE, MUTED, NEGATIVE, POSITIVE, new_figure
from analyses.views.scripts import FLOW

_MARKERS = {"head": "o", "mlp": "s", "embed": "D", "logits": "^"}
_KINDS = {"head": "head", "mlp": "MLP", "embed": "embedding", "logits": "logits"}
_LEGEND_WIDTH = 600.0
_POINTS_PER_PIXEL = 0.75
_STATIC_EDGES = 500  # what nobody can prune should not be a tangle


class FlowView(View):
    """A flow graph: interactive HTML, and SVG and PNG that show its strongest edges."""

    def __init__(self, layout: Layout, title: str, target: str, target_value: float | None, shown: int) -> None:
        self.layout = layout
        self._subtitle = (
            f"How relevance reaches {target}: tokens along the page, layers upwards, the answer on top. Point at a part or an edge to read "
            "it, click a part to open it, move the slider to leave the strongest edges."
        )
        super().__init__(
            title,
            lambda: _figure(layout, min(shown, _STATIC_EDGES)),
            component="Flow",
            props=_props(layout, title, target, target_value, shown),
            script=FLOW,
        )

    def to_html(self) -> str:
        """A self-contained page with this picture alone, and how to read it."""
        return Page(self.title, self._subtitle).view(self).to_html()


def flow_view(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    tokens: Sequence[str],
    target: str = "target",
    target_value: float | None = None,
    shown: int = 200,
    max_edges: int = 5_000,
    title: str = "Relevance flow",
) -> FlowView:
    """Nodes and edges of a relevance graph over tokens (x) and layers (y).

    Hovering a node or an edge tells what it is; clicking a node opens its edges, readers and details; the slider leaves the strongest
    edges; the search finds components.

    Args:
        nodes: columns `node` (`embed`, `pos_embed`, `bias`, `L3H5`, `L3.mlp`, `logits`; also readers `L4H1.q`, `.k`, `.v`, `L4.mlp.in`,
            which are shown when their component is opened), `position`, `score`; optionally `details`, shown when a node is opened: a
            number, text, dict, list of dicts, DataFrame, or a dict of these; `kind` (head, mlp, embed, logits) and `layer` for names of
            another form.
        edges: columns `source`, `target` (a node or a reader), `position`, `score`; optionally `source_position` for edges between tokens.
            A node that only an edge names is drawn hollow.
        tokens: one string per position.
        target: what is explained, in words (`logit(" Mary") - logit(" John")`).
        target_value: its value, of which hovering tells a node's share; by default the score of the `logits` nodes if there are any.
        shown: how many of the strongest edges are drawn at first, and, up to 500, in the static pictures.
        max_edges: how many of the strongest edges the page holds.

    Raises:
        ValueError: a missing column, a name that is no component, a position without a token, the same node twice, a score that is not
            finite.
    """
    layout = lay_out(nodes, edges, tokens, max_edges)
    if target_value is None:
        scores = [mark.score for mark in layout.marks if mark.kind == "logits" and mark.score is not None]
        target_value = sum(scores) if scores else None
    return FlowView(layout, title, target, target_value, min(shown, len(layout.links)))


def _props(layout: Layout, title: str, target: str, target_value: float | None, shown: int) -> dict[str, Any]:
    """What `flow.js` draws; short keys and six digits, since a page may hold thousands of edges."""
    marks = [
        {
            "name": mark.name,
            "kind": mark.kind,
            "position": mark.position,
            "score": None if mark.score is None else round_significant(mark.score),
            "x": round(mark.x, 1),
            "y": round(mark.y, 1),
            "r": mark.r,
            "labelled": mark.labelled,
            "readers": {name: round_significant(score) for name, score in mark.readers.items()},
            "details": detail_blocks(mark.details),
        }
        for mark in layout.marks
    ]
    return {
        "title": title,
        "target": target,
        "targetValue": target_value,
        "tokens": layout.tokens,
        "labels": [show_token(token) for token in layout.tokens],
        "columns": layout.columns,
        "bands": layout.bands,
        "width": layout.width,
        "height": layout.height,
        "nodes": marks,
        "edges": [[link.source, link.target, round_significant(link.score), link.reader] for link in layout.links],
        "dropped": layout.dropped,
        "shown": shown,
    }


def detail_blocks(details: Any) -> list[dict[str, Any]]:
    """A node's details as tables: blocks of `name`, `columns` (may be empty) and `rows`."""
    if details is None:
        return []
    if not isinstance(details, Mapping):
        return [_block("", details)]
    plain = {name: value for name, value in details.items() if isinstance(value, str | Real | None)}
    blocks = [_block("", plain)] if plain else []
    return blocks + [_block(str(name), value) for name, value in details.items() if name not in plain]


def _block(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    if isinstance(value, Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {"name": name, "columns": [], "rows": [[str(key), _cell(cell)] for key, cell in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, str):
        if value and all(isinstance(row, Mapping) for row in value):
            columns = list(dict.fromkeys(key for row in value for key in row))
            rows = [[_cell(row.get(key)) for key in columns] for row in value]
            return {"name": name, "columns": [str(key) for key in columns], "rows": rows}
        return {"name": name, "columns": [], "rows": [[_cell(item)] for item in value]}
    return {"name": name, "columns": [], "rows": [[_cell(value)]]}


def _cell(value: Any) -> str | float | int | None:
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else str(bool(value))
    if isinstance(value, Real):
        number = float(value)
        return round_significant(number) if np.isfinite(number) else None
    return str(value)


def _figure(layout: Layout, shown: int) -> Figure:
    width = max(layout.width, _LEGEND_WIDTH)
    figure = new_figure(width * _POINTS_PER_PIXEL / 72, (layout.height + 26) * _POINTS_PER_PIXEL / 72)
    figure.set_layout_engine("none")  # the axes are the whole figure
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(0, width), ylim=(layout.height + 26, 0))
    axis.set_axis_off()
    _draw_ground(axis, layout)
    _draw_edges(axis, layout, shown)
    _draw_marks(axis, layout)
    signs = {"for the target": POSITIVE, "against it": NEGATIVE}
    colours = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in signs.items()]
    plain: dict[str, Any] = {"color": MUTED, "linestyle": "", "markersize": 4.5}
    shapes = [Line2D([], [], marker=marker, label=_KINDS[kind], **plain) for kind, marker in _MARKERS.items()]
    if any(mark.score is None and mark.kind == "head" for mark in layout.marks):
        shapes.append(Line2D([], [], marker="o", markerfacecolor="white", label="head, where it reads", **plain))
    axis.legend(handles=[*colours, *shapes], loc="lower center", ncols=7, frameon=False, fontsize=7, handletextpad=0.4, columnspacing=1.2)
    return figure


def _draw_ground(axis: Axes, layout: Layout) -> None:
    for x, token in zip(layout.columns, layout.tokens, strict=True):
        axis.plot([x, x], [22, layout.height - 22], color=LINE, linewidth=0.5, zorder=0)
        label = short(show_token(token))
        axis.text(x, layout.height - 10, label, ha="center", va="center", family="monospace", fontsize=7.5, parse_math=False)
    for name, y in layout.bands:
        axis.text(6, y, name, va="center", fontsize=7, color=MUTED)


def _draw_edges(axis: Axes, layout: Layout, shown: int) -> None:
    links = layout.links[:shown][::-1]  # the strongest on top
    if not links:
        return
    strongest = abs(layout.links[0].score) or 1.0
    strengths = np.sqrt([abs(link.score) / strongest for link in links])
    curves = []
    for link in links:
        source, target = layout.marks[link.source], layout.marks[link.target]
        first, second = curve(source, target)
        points = [(source.x, source.y), first, second, (target.x, target.y)]
        curves.append(Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]))
    colours = [POSITIVE if link.score >= 0 else NEGATIVE for link in links]
    collection = PathCollection(curves, facecolors="none", edgecolors=colours, zorder=1)
    collection.set_linewidth([(0.5 + 3.3 * strength) * _POINTS_PER_PIXEL for strength in strengths])
    collection.set_alpha([0.2 + 0.6 * strength for strength in strengths])
    axis.add_collection(collection)


def _draw_marks(axis: Axes, layout: Layout) -> None:
    for kind, marker in _MARKERS.items():
        marks = [mark for mark in layout.marks if mark.kind == kind]
        fills = ["white" if mark.score is None else POSITIVE if mark.score >= 0 else NEGATIVE for mark in marks]
        borders = [MUTED if mark.score is None else "white" for mark in marks]
        sizes = [(2 * mark.r * _POINTS_PER_PIXEL * (0.8 if kind in ("mlp", "embed") else 1)) ** 2 for mark in marks]
        x, y = [mark.x for mark in marks], [mark.y for mark in marks]
        axis.scatter(x, y, s=sizes, c=fills, edgecolors=borders, linewidths=0.7, marker=marker, zorder=2)
    for mark in layout.marks:
        if mark.labelled:
            above = mark.y - mark.r - 2
            name = axis.text(mark.x, above, mark.name, ha="center", va="bottom", fontsize=6.5, fontweight="bold", color=INK, zorder=3)
            name.set_path_effects([withStroke(linewidth=2, foreground="white")])
