"""The flow view: relevance flowing through a model as a graph over tokens and layers, to be explored in a browser or printed in a paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from analyses.views.flow_marks import Flow, flow_of
from analyses.views.flow_static import flow_figure
from analyses.views.markup import round_significant, show_token
from analyses.views.page import Page, View
from analyses.views.scripts import FLOW

_STATIC_EDGES = 120  # a picture that nobody can prune should not be a tangle


class FlowView(View):
    """A flow graph: interactive HTML, and SVG and PNG that show its strongest edges."""

    def __init__(self, flow: Flow, title: str, *, target: str, target_value: float | None, shown: int, info: Mapping[str, str]) -> None:
        self.flow = flow
        what = "What makes up" if info.get("kind") == "contribution" else "How relevance reaches"
        self._subtitle = (
            f"{what} {target}. Tokens along the page, layers upwards, the answer on top. Point at a node or an edge to read "
            "it, click a node to open it; the slider chooses how many edges are drawn, the strongest paths first."
        )
        super().__init__(
            title,
            lambda: flow_figure(flow, min(shown, _STATIC_EDGES), info),
            component="Flow",
            props=_props(flow, title, target, target_value, flow.shown(shown), info),
            script=FLOW,
        )

    def to_html(self) -> str:
        """A self-contained page with this picture alone, and how to read it."""
        return Page(self.title, self._subtitle).view(self).to_html()


def flow_view(
    nodes: pd.DataFrame,
    edges: pd.DataFrame,
    tokens: Sequence[str],
    *,
    target: str = "target",
    target_value: float | None = None,
    shown: int = 100,
    max_edges: int = 5_000,
    title: str = "Relevance flow",
    paths: pd.DataFrame | None = None,
    info: Mapping[str, str] | None = None,
) -> FlowView:
    """Nodes and edges of a relevance graph over tokens (x) and layers (y).

    Pointing at a node or an edge tells what it is; clicking a node opens its edges, inputs and details; the slider chooses how many of the
    strongest edges are drawn, those of the listed paths first. Every edge drawn lies on a path from a token to the target that is drawn
    whole, where the graph has one.

    Args:
        nodes: Columns `node` (`embed`, `pos_embed`, `bias`, `L3H5`, `L3.mlp`, `logits`; also readers `L4H1.q`, `.k`, `.v`, `L4.mlp.in`,
            which are shown when their component is opened; and states of the stream, `L3.resid`, `L3.resid_mid`),
            `position`, `score`; optionally `details`, shown when a node is opened: a
            number, text, dict, list of dicts, DataFrame, or a dict of these; `low`, `high` and `reliable`, where the effect of patching the
            node is expected; `kind` (head, mlp, embed, logits) and `layer` for names of
            another form.
        edges: Columns `source`, `target` (a node or a reader), `position`, `score`; optionally `source_position` for edges between tokens.
            A node that only an edge names is drawn hollow.
        tokens: One string per position.
        target: What is explained, in words (`logit(" Mary") - logit(" John")`).
        target_value: Its value, of which hovering tells a node's share; by default the score of the `logits` nodes if there are any.
        shown: How many of the strongest edges are drawn at first, and, up to 120, in the static pictures.
        max_edges: How many of the strongest edges the page holds.
        title: Above the picture.
        paths: The strongest paths, as `FlowGraph.paths` gives them; listed beside the picture.
        info: What makes the picture repeatable (model, prompt, reference, ruleset, versions); shown on the page and in every file saved.

    Raises:
        RelevanceError: A missing column, a name that is no component, a position without a token, the same node twice, a score that is not
            finite.
    """
    flow = flow_of(nodes, edges, tokens, max_edges=max_edges, paths=paths)
    if target_value is None:
        scores = [mark.score for mark in flow.marks if mark.kind == "logits" and mark.score is not None]
        target_value = sum(scores) if scores else None
    return FlowView(flow, title, target=target, target_value=target_value, shown=shown, info=dict(info or {}))


def _props(flow: Flow, title: str, target: str, target_value: float | None, shown: int, info: Mapping[str, str]) -> dict[str, Any]:
    """What `flow.js` draws; short keys and six digits, since a page may hold thousands of edges."""
    marks = [
        {
            "name": mark.name,
            "kind": mark.kind,
            "layer": mark.layer,
            "order": mark.order,
            "position": mark.position,
            "score": None if mark.score is None else round_significant(mark.score),
            "readers": {name: round_significant(score) for name, score in mark.readers.items()},
            "details": detail_blocks(mark.details),
            "interval": None if mark.interval is None else [round_significant(end) for end in mark.interval[:2]] + [mark.interval[2]],
        }
        for mark in flow.marks
    ]
    rounded = round_significant
    return {
        "title": title,
        "target": target,
        "targetValue": target_value,
        "tokens": flow.tokens,
        "labels": [show_token(token) for token in flow.tokens],
        "nodes": marks,
        "edges": [[link.source, link.target, rounded(link.score), link.reader, rounded(link.strength)] for link in flow.links],
        "paths": [{"nodes": p.marks, "edges": p.links, "share": rounded(p.share), "weakest": rounded(p.weakest)} for p in flow.paths],
        "whole": flow.whole,
        "dropped": flow.dropped,
        "shown": shown,
        "info": dict(info),
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
