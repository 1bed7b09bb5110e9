"""Attention heads: from which token to which they carry relevance (F_h), and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from analyses.components import Node
from analyses.views.heatmap import HeatMap, heat_map_view
from analyses.views.markup import as_array, check_tokens, format_number, one_example, round_significant, rounded, short, show_token
from analyses.views.page import View
from analyses.views.palette import NEGATIVE, POSITIVE, SIGNED, add_scale, limit_of, new_figure
from analyses.views.scripts import CIRCUITSVIS
from analyses.views.tokens import inert
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import RelevanceError

# Thumbnails in the static picture; the interactive one holds all that were asked for.
_STATIC_HEADS = 8


def head_flow_view(
    tokens: Sequence[str],
    flow: Float[Tensor | np.ndarray, "*heads query key"],
    names: Sequence[str] | None = None,
    *,
    top: int = 12,
    causal: bool = True,
    title: str = "Relevance flow of the heads",
) -> View:
    """Heads ranked by relevance, each with its signed flow from key to query tokens (CircuitsVis `attention_heads`).

    Args:
        tokens: one string per position.
        flow: relevance that a head carries from each key position to each query position, `F_h[t, s]`: `[layer, head, query, key]`, or
            `[head, query, key]` with `names`. A head's relevance is the sum of its flow.
        names: names of the heads of a three-dimensional `flow`; `L{layer}H{head}` by default for a four-dimensional one.
        top: how many heads are shown, those with the largest |relevance| first.
        causal: whether a query cannot see later keys; flow from there is then an error.

    Raises:
        RelevanceError: shapes that do not fit together, or a value that is not finite.
    """
    values = as_array(flow, "flow")
    if values.ndim == 4:
        names = names or [str(Node("heads", layer, head=head)) for layer in range(values.shape[0]) for head in range(values.shape[1])]
        values = values.reshape(-1, *values.shape[2:])
    if values.ndim != 3 or values.shape[1] != values.shape[2]:
        raise RelevanceError(f"flow has the shape {values.shape}; give [layer, head, query, key] or [head, query, key] of one example")
    tokens = check_tokens(tokens, values.shape[-1], "flow")
    if names is None or len(names) != len(values):
        raise RelevanceError(f"flow holds {len(values)} heads: give one name for each (names)")
    if causal and np.abs(np.triu(values, k=1)).max(initial=0.0) > 0:
        raise RelevanceError("flow has relevance from later keys to earlier queries, which a causal model cannot have: pass causal=False")
    scores = values.sum(axis=(1, 2))
    order = np.argsort(-np.abs(scores), kind="stable")[:top]
    labels = [f"{names[i]} {format_number(scores[i], digits=2)}" for i in order]
    ranked, limit = values[order], limit_of(values[order])
    props = {
        "attention": rounded(ranked),
        "tokens": [inert(token) for token in tokens],
        "attentionHeadNames": labels,
        "minValue": -round_significant(limit),
        "maxValue": round_significant(limit),
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE,
        "maskUpperTri": False,  # grey triangles would be all that one sees
    }
    return View(title, lambda: _figure(tokens, ranked, labels, limit), component="AttentionHeads", props=props, script=CIRCUITSVIS)


def head_heatmap_view(scores: Float[Tensor | np.ndarray, "layer head"] | RelevanceCache, title: str = "Relevance of each head") -> View:
    """Heads as a heat map, layer by head, signed.

    Args:
        scores: one number per head; or a whole RelevanceCache of one example, whose heads are summed over positions.
    """
    if isinstance(scores, RelevanceCache):
        scores = one_example(scores).heads()[0].sum(0)
    return heat_map_view(title, [head_heat_map(as_array(scores, "scores"), title)])


def head_heat_map(scores: np.ndarray, title: str, limit: float | None = None) -> HeatMap:
    """`scores [layer, head]` with the heads' names in TransformerLens's notation."""
    if scores.ndim != 2:
        raise RelevanceError(f"scores has the shape {scores.shape}; give [layer, head], summed over positions and averaged over examples")
    layers, heads = scores.shape
    names = [[str(Node("heads", layer, head=head)) for head in range(heads)] for layer in range(layers)]
    rows, columns = [str(layer) for layer in range(layers)], [str(head) for head in range(heads)]
    return HeatMap(title, scores, rows, columns, "layer", "head", limit or limit_of(scores), names)


def _figure(tokens: list[str], flow: np.ndarray, labels: list[str], limit: float) -> Figure:
    shown = min(len(flow), _STATIC_HEADS)
    columns = max(min(shown, 4), 1)
    rows = -(-shown // columns)
    side = min(max(1.7, 0.09 * len(tokens) + 0.8), 2.6)
    figure = new_figure(columns * side + 0.9, rows * (side + 0.35))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[shown:]:
        axis.set_axis_off()
    ticks = range(len(tokens)) if len(tokens) <= 24 else []
    for axis, pattern, label in zip(axes, flow, labels, strict=False):
        axis.imshow(pattern, cmap=SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(label, fontsize=9)
        axis.set_xticks(ticks, [short(show_token(tokens[i])) for i in ticks], rotation=90, fontsize=6)
        axis.set_yticks(ticks, [short(show_token(tokens[i])) for i in ticks], fontsize=6)
        axis.tick_params(length=0)
    for axis in axes[max(shown - columns, 0) : shown]:
        axis.set_xlabel("from (key)", fontsize=8)
    for axis in axes[:shown:columns]:
        axis.set_ylabel("to (query)", fontsize=8)
    add_scale(figure, limit)
    return figure
