"""What the flow view draws: tables of nodes and edges become marks (a component at a position) and links between them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from analyses.components import ERROR, FEATURES, LOGITS, MLP_INPUT, SKIP, SOURCES, find_node
from analyses.views.flow_strength import path_strengths
from lens_relevance.errors import RelevanceError

_STREAM = {"resid": "early stream", "resid_mid": "middle stream", "resid_post": "late stream"}  # states of the residual stream


@dataclass(frozen=True)
class Component:
    """What a name in a flow graph stands for. A reader (`L4H1.q`, `L4.mlp.in`) belongs to the component whose input it is."""

    name: str
    kind: str  # head, mlp, feature, error, embed, logits or stream, with "early", "middle" or "late" where a layer has several rows of it
    layer: int | None
    order: int  # among the components of one row
    reader: str = ""


@dataclass
class Mark:
    """One drawn node: a component at a position. `score` is None where only edges name it. interval: low, high, whether it is narrow."""

    name: str
    kind: str
    layer: int | None
    position: int
    score: float | None = None
    readers: dict[str, float] = field(default_factory=dict)
    details: Any = None
    order: int = 0
    interval: tuple[float, float, bool] | None = None


@dataclass(frozen=True)
class Link:
    """One drawn edge, from mark `source` to mark `target` (indices).

    reader: the input by which it enters (`q`, `k`, `v`, `in`), "" for the logits and inside a component. strength: see `path_strengths`.
    """

    source: int
    target: int
    score: float
    reader: str
    strength: float


@dataclass(frozen=True)
class FlowPath:
    """One path from an input to the target: its marks and links (indices), its share of all relevance, its weakest edge's score."""

    marks: tuple[int, ...]
    links: tuple[int, ...]
    share: float
    weakest: float


@dataclass(frozen=True)
class Flow:
    """A flow graph to be drawn.

    links: in the order in which the slider shows them: path by path those of the listed paths, then the others by `strength`, and by
        |score|. whole: how many of the first links make a picture in which every link that has a path lies on one that is drawn whole.
        dropped: how many links were too many for the page.
    """

    tokens: list[str]
    marks: list[Mark]
    links: list[Link]
    paths: list[FlowPath]
    whole: list[int]
    dropped: int

    def shown(self, n: int) -> int:
        """How many links have to be drawn so that the first n are, and every one of them lies on a path that is drawn whole."""
        return next((count for count in self.whole if count >= n), len(self.links))


def parse_component(name: str) -> Component:
    """What `name` stands for; RelevanceError where it is not a name of the flow graph."""
    node = find_node(name)
    if node is not None and node.position is None:
        if node.component == LOGITS:
            return Component(name, "logits", None, 0)
        if node.component in SOURCES:
            return Component(name, "embed", None, SOURCES.index(name))
        if node.component in ("mlp", MLP_INPUT):
            return Component(str(node.owner), "mlp", node.layer, 0, "in" if node.component == MLP_INPUT else "")
        if node.component in ("heads", "q", "k", "v"):
            return Component(str(node.owner), "head", node.layer, node.head or 0, "" if node.component == "heads" else node.component)
        if node.component in (FEATURES, SKIP):
            return Component(name, "feature", node.layer, 10**9 if node.feature is None else node.feature)
        if node.component == ERROR:
            return Component(name, "error", node.layer, 2 * 10**9)
        if node.component in _STREAM:
            return Component(name, _STREAM[node.component], node.layer, 0)
    forms = "embed, pos_embed, bias, L3H5, L3H5.q (k, v), L3.mlp, L3.mlp.in, L3.resid, L3F17, L3.features, L3.skip, L3.error, logits"
    raise RelevanceError(f"{name!r} is no component of a flow graph; names are {forms}")


def flow_of(nodes: pd.DataFrame, edges: pd.DataFrame, tokens: Sequence[str], *, max_edges: int, paths: pd.DataFrame | None = None) -> Flow:
    """Marks, links and paths from tables as in `flow_view`, the strongest `max_edges` links of them."""
    marks: dict[tuple[str, int], Mark] = {}
    _add_nodes(marks, nodes, len(tokens))
    links, between = _links(marks, edges, len(tokens))
    _put_below_heads(list(marks.values()), links)
    index = {key: i for i, key in enumerate(marks)}
    found = [] if paths is None else [_path(row, index, between) for row in paths.itertuples()]
    listed = [path for path in found if path is not None]
    order, whole = _in_order(links, listed)
    rank = {i: n for n, i in enumerate(order[:max_edges])}
    kept = [replace(path, links=tuple(rank[i] for i in path.links)) for path in listed if all(i in rank for i in path.links)]
    counts = [count for count in whole if count <= len(rank)]
    return Flow(list(tokens), list(marks.values()), [links[i] for i in rank], kept, counts, dropped=len(links) - len(rank))


def _in_order(links: Sequence[Link], listed: Sequence[FlowPath]) -> tuple[list[int], list[int]]:
    """The order in which links are shown, and the counts at which what is shown is whole."""
    first = dict.fromkeys(i for path in listed for i in path.links)
    whole = [len({i for path in listed[: n + 1] for i in path.links}) for n in range(len(listed))]
    rest = sorted((i for i in range(len(links)) if i not in first), key=lambda i: (-links[i].strength, -abs(links[i].score)))
    strengths = [links[i].strength for i in rest]
    ends = [n + 1 for n, strength in enumerate(strengths) if strength == 0 or strengths[n + 1 : n + 2] != [strength]]
    return [*first, *rest], [*dict.fromkeys(whole), *(len(first) + n for n in ends)]


def _put_below_heads(marks: Sequence[Mark], links: Sequence[Link]) -> None:
    """Features that the heads of their own layer read come before these: they have a kind of their own, for a row below."""
    before = {
        marks[link.source].layer
        for link in links
        if marks[link.source].kind in ("feature", "error")
        and marks[link.target].kind == "head"
        and marks[link.source].layer == marks[link.target].layer
    }
    for mark in marks:
        if mark.kind in ("feature", "error") and mark.layer in before:
            mark.kind = f"early {mark.kind}"


def _add_nodes(marks: dict[tuple[str, int], Mark], nodes: pd.DataFrame, n_tokens: int) -> None:
    _need(nodes, ("node", "position", "score"), "nodes")
    for row in nodes.to_dict("records"):
        part = _component(row)
        score = _number(row["score"], f"the score of node {row['node']!r}")
        mark = _mark(marks, part, _position(row["position"], n_tokens, row["node"]))
        if (part.reader and part.reader in mark.readers) or (not part.reader and mark.score is not None):
            raise RelevanceError(f"nodes names {row['node']!r} at position {mark.position} twice; add the scores up first")
        if part.reader:
            mark.readers[part.reader] = score
            continue
        mark.score = score
        details = row.get("details")
        if not pd.isna(row.get("low")):
            mark.interval = float(row["low"]), float(row["high"]), bool(row["reliable"])
        mark.details = None if details is None or (isinstance(details, float) and math.isnan(details)) else details


def _component(row: dict[Hashable, Any]) -> Component:
    """The row's component by its name; `kind` and `layer` speak for names that are not of the usual form."""
    name = str(row["node"])
    try:
        return parse_component(name)
    except RelevanceError:
        kind = row.get("kind")
        if kind not in ("head", "mlp", "feature", "error", "embed", "logits"):
            raise
        layer = int(row["layer"]) if kind in ("head", "mlp", "feature", "error") else None
        return Component(name, kind, layer, 1_000)


Ends = tuple[tuple[str, int], tuple[str, int]]


def _links(marks: dict[tuple[str, int], Mark], edges: pd.DataFrame, n_tokens: int) -> tuple[list[Link], dict[Ends, int]]:
    """Links, and which of them each edge of the table became. An edge from a reader to its own component at one position is not drawn."""
    _need(edges, ("source", "target", "position", "score"), "edges")
    known = {mark.name: Component(mark.name, mark.kind, mark.layer, mark.order) for mark in marks.values()}
    index = {key: i for i, key in enumerate(marks)}
    rows = edges.to_dict("records")
    ends: list[Ends] = []
    for row in rows:
        name = f"{row['source']} -> {row['target']}"
        position = _position(row["position"], n_tokens, name)
        given = row.get("source_position")
        source_position = position if given is None or pd.isna(given) else _position(given, n_tokens, name)
        ends.append(((str(row["source"]), source_position), (str(row["target"]), position)))
    scores = [_number(row["score"], f"the score of edge {row['source']} -> {row['target']}") for row in rows]
    components = {name: known.get(name) or parse_component(name) for pair in ends for name, _ in pair}
    strengths = _strengths(ends, scores, components)
    links: list[Link] = []
    between: dict[Ends, int] = {}
    for pair, score, strength in zip(ends, scores, strengths, strict=True):
        (source, target), made = pair, []
        for name, place in pair:
            part = components[name]
            _mark(marks, part, place)
            made.append(index.setdefault((part.name, place), len(index)))
        if made[0] != made[1]:
            between[pair] = len(links)
            # inside a head the edge from the position that it reads at says by which input
            links.append(Link(made[0], made[1], score, components[target[0]].reader or components[source[0]].reader, strength))
    return links, between


def _strengths(ends: Sequence[Ends], scores: Sequence[float], components: Mapping[str, Component]) -> list[float]:
    """A reader without an edge of its own into its component (some graphs leave these out) is taken as connected with it."""
    places = dict.fromkeys(place for pair in ends for place in pair)
    leaving = {source for source, _ in ends}
    free = [((name, at), (components[name].name, at)) for name, at in places if components[name].reader and (name, at) not in leaving]
    kinds = ("embed", "error"), ("logits",)
    inputs, targets = ([place for place in places if components[place[0]].kind in kind] for kind in kinds)
    return path_strengths(ends, scores, inputs=inputs, targets=targets, free=free)


def _path(row: Any, index: dict[tuple[str, int], int], links: dict[Ends, int]) -> FlowPath | None:
    """A row of `FlowGraph.paths`; None where the page does not hold all of it."""
    nodes = [_place(text) for text in str(row.path).split(" -> ")]
    marks = [index.get((parse_component(name).name, position)) for name, position in nodes]
    taken = [links.get(pair) for pair in zip(nodes[:-1], nodes[1:], strict=True)]
    distinct = [mark for i, mark in enumerate(marks) if i == 0 or mark != marks[i - 1]]
    found = [link for link in taken if link is not None]
    if any(mark is None for mark in distinct) or len(found) < len(distinct) - 1:
        return None
    return FlowPath(tuple(m for m in distinct if m is not None), tuple(found), float(row.share), float(row.weakest))


def _place(text: str) -> tuple[str, int]:
    name, _, position = text.partition("@")
    return name, int(position) if position else 0


def _mark(marks: dict[tuple[str, int], Mark], part: Component, position: int) -> Mark:
    return marks.setdefault((part.name, position), Mark(part.name, part.kind, part.layer, position, order=part.order))


def _need(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in frame.columns]:
        listed = ", ".join(map(str, frame.columns))
        raise RelevanceError(f"{name} has no column {missing[0]!r}; it needs {', '.join(columns)} and has {listed}")


def _position(value: Any, n_tokens: int, name: object) -> int:
    if pd.isna(value) or not 0 <= int(value) < n_tokens:
        raise RelevanceError(f"{name} is at position {value}, but the {n_tokens} tokens have positions 0 to {n_tokens - 1}")
    return int(value)


def _number(value: Any, name: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise RelevanceError(f"{name} is {number}; leave it out or look for the cause first")
    return number
