"""The flow view as a static picture: its strongest edges, drawn by matplotlib where no script runs and for papers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke

from analyses.views.flow_layout import Placement, curve, place
from analyses.views.flow_marks import Flow
from analyses.views.markup import short, show_token
from analyses.views.palette import INK, LINE, MUTED, NEGATIVE, POSITIVE, new_figure

_MARKERS = {"head": "o", "mlp": "s", "feature": "H", "error": "v", "embed": "D", "logits": "^", "stream": "X"}
_KINDS = {
    "head": "head",
    "mlp": "MLP",
    "feature": "feature",
    "error": "missed by a dictionary",
    "embed": "embedding",
    "logits": "logits",
    "stream": "residual stream",
}
_ALWAYS = ("head", "mlp", "embed", "logits")
_WIDTH, _ROW = 900.0, 26.0
_BELOW = 44.0  # for the legend and the line that says what this is
_POINTS_PER_PIXEL = 0.75
_LABELLED = 24


def drawn_marks(flow: Flow, shown: int) -> list[int]:
    """Marks at the ends of the first `shown` links; all marks where there are no links."""
    if not flow.links:
        return list(range(len(flow.marks)))
    return sorted({end for link in flow.links[:shown] for end in (link.source, link.target)})


def flow_figure(flow: Flow, shown: int, info: Mapping[str, str]) -> Figure:
    """The first `shown` links (see `Flow.shown`) and the marks at their ends."""
    shown = flow.shown(shown)
    drawn = drawn_marks(flow, shown)
    rows = len({(flow.marks[i].kind, flow.marks[i].layer) for i in drawn})
    height = max(rows, 4) * _ROW + 60
    labels = [show_token(token) for token in flow.tokens]
    placement = place(flow.marks, drawn, labels, width=_WIDTH, height=height)
    figure = new_figure(_WIDTH * _POINTS_PER_PIXEL / 72, (height + _BELOW) * _POINTS_PER_PIXEL / 72)
    figure.set_layout_engine("none")  # the axes are the whole figure
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(0, _WIDTH), ylim=(height + _BELOW, 0))
    axis.set_axis_off()
    _draw_ground(axis, placement, labels)
    _draw_edges(axis, flow, placement, shown)
    _draw_marks(axis, flow, placement)
    contributions = (info or {}).get("kind") == "contribution"
    signs = {"contribution": POSITIVE} if contributions else {"for the target": POSITIVE, "against it": NEGATIVE}
    colours = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in signs.items()]
    plain: dict[str, Any] = {"color": MUTED, "linestyle": "", "markersize": 4.5}
    named = {*_ALWAYS, *(flow.marks[i].kind.split()[-1] for i in drawn)}
    shapes = [Line2D([], [], marker=marker, label=_KINDS[kind], **plain) for kind, marker in _MARKERS.items() if kind in named]
    if any(flow.marks[i].score is None and flow.marks[i].kind == "head" for i in drawn):
        shapes.append(Line2D([], [], marker="o", markerfacecolor="white", label="head, where it reads", **plain))
    legend: dict[str, Any] = {"ncols": 8, "frameon": False, "fontsize": 7, "handletextpad": 0.4, "columnspacing": 1.2}
    axis.legend(handles=[*colours, *shapes], loc="lower center", bbox_to_anchor=(0.5, 18 / (height + _BELOW)), **legend)
    if info:
        axis.text(6, height + _BELOW - 8, short(provenance(info), 170), fontsize=5.5, color=MUTED, va="center", parse_math=False)
    return figure


def provenance(info: Mapping[str, str]) -> str:
    """What a picture shows, in one line: model, ruleset, target, reference, version."""
    named = {name: info[name] for name in ("model", "ruleset", "target", "prompt", "reference") if info.get(name)}
    version = f" · lens_relevance {info['lens_relevance']}" if info.get("lens_relevance") else ""
    return " · ".join(f"{name}: {value}" for name, value in named.items()) + version


def _draw_ground(axis: Axes, placement: Placement, labels: list[str]) -> None:
    bottom = placement.height - 24
    for column in placement.columns:
        if column.count == 1:
            axis.plot([column.centre] * 2, [14, bottom], color=LINE, linewidth=0.5, zorder=0)
        label = short(labels[column.position]) if column.count == 1 else "…"
        axis.text(column.centre, placement.height - 10, label, ha="center", va="center", family="monospace", fontsize=7.5, parse_math=False)
    for row in placement.rows:
        axis.text(6, row.y, row.name, va="center", fontsize=7, color=MUTED)


def _draw_edges(axis: Axes, flow: Flow, placement: Placement, shown: int) -> None:
    links = flow.links[:shown][::-1]  # the strongest on top
    if not links:
        return
    strongest = max(abs(link.score) for link in flow.links) or 1.0
    strengths = np.sqrt([abs(link.score) / strongest for link in links])
    curves = []
    for link in links:
        source, target = (placement.marks[i][:2] for i in (link.source, link.target))
        first, second = curve(source, target)
        curves.append(Curve([source, first, second, target], [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]))
    colours = [POSITIVE if link.score >= 0 else NEGATIVE for link in links]
    collection = PathCollection(curves, facecolors="none", edgecolors=colours, zorder=1)
    collection.set_linewidth([(0.5 + 3.3 * strength) * _POINTS_PER_PIXEL for strength in strengths])
    collection.set_alpha([0.25 + 0.6 * strength for strength in strengths])
    axis.add_collection(collection)


def _draw_marks(axis: Axes, flow: Flow, placement: Placement) -> None:
    for kind, marker in _MARKERS.items():
        here = [(flow.marks[i], at) for i, at in placement.marks.items() if flow.marks[i].kind.split()[-1] == kind]
        fills = ["white" if mark.score is None else POSITIVE if mark.score >= 0 else NEGATIVE for mark, _ in here]
        borders = [MUTED if mark.score is None else "white" for mark, _ in here]
        sizes = [(2 * r * _POINTS_PER_PIXEL * (0.8 if kind in ("mlp", "embed") else 1)) ** 2 for _, (_, _, r) in here]
        across, down = [at[0] for _, at in here], [at[1] for _, at in here]
        axis.scatter(across, down, s=sizes, c=fills, edgecolors=borders, linewidths=0.7, marker=marker, zorder=2)
    scored = [i for i in placement.marks if flow.marks[i].score is not None and flow.marks[i].layer is not None]
    ranked = sorted(scored, key=lambda i: -abs(flow.marks[i].score or 0))
    taken: list[tuple[float, float]] = []
    for i in ranked[:_LABELLED]:
        x, y, r = placement.marks[i]
        if any(abs(x - a) <= 34 and abs(y - r - b) <= 11 for a, b in taken):
            continue  # a stronger one's name stands there already
        taken.append((x, y - r))
        name = axis.text(x, y - r - 2, flow.marks[i].name, ha="center", va="bottom", fontsize=6.5, fontweight="bold", color=INK, zorder=3)
        name.set_path_effects([withStroke(linewidth=2, foreground="white")])
