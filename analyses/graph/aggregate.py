"""Flow graphs joined: over positions, over groups of heads, over a data set; and one graph less another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from analyses.components import owner
from analyses.graph.tables import EDGE_KEYS, INTERVALS, FlowTables, Tables, no_features
from lens_relevance.errors import RelevanceError

_KEYS = {"edges": EDGE_KEYS, "nodes": ["node", "component", "layer", "head", "position", "token"], "sinks": ["node", "position", "sink"]}
_KEYS["neurons"] = ["node", "position", "neuron"]


def sum_positions(graph: Tables) -> Tables:
    """See `FlowGraph.sum_positions`."""
    edges = graph.edges.assign(position=-1, source_position=-1)
    nodes = graph.nodes.assign(position=-1, token="(all)")
    return _joined(graph, edges, nodes, graph.sinks.assign(position=-1), graph.neurons.assign(position=-1))


def group(graph: Tables, groups: Mapping[str, Sequence[str]]) -> Tables:
    """See `FlowGraph.group`."""
    member: dict[str, str] = {}
    known = set(graph.nodes["node"]) | set(graph.edges["source"]) | set(graph.edges["target"])
    owners = {owner(name) for name in known}
    for name, members in groups.items():
        for node in members:
            if node in member:
                raise RelevanceError(f"{node!r} is in two groups, {member[node]!r} and {name!r}")
            if node not in owners:
                raise RelevanceError(f"group {name!r}: there is no head or MLP {node!r} in this graph")
            member[node] = name
    rename = {name: member.get(owner(name), name) for name in known}
    edges = graph.edges.assign(source=graph.edges["source"].map(rename), target=graph.edges["target"].map(rename))
    inside = (edges["source"] == edges["target"]) & edges["source"].isin(list(groups))
    # A group's score is what its members write, not also what their readers read.
    own = graph.nodes[~graph.nodes["node"].map(rename).isin(list(groups)) | ~graph.nodes["node"].str.contains(r"\.(?:q|k|v|in)$")]
    nodes = own.assign(node=own["node"].map(rename))
    grouped = nodes["node"].isin(list(groups))
    nodes["component"] = nodes["component"].where(~grouped, "group")
    nodes["head"] = nodes["head"].where(~grouped, -1)
    top = nodes.groupby("node")["layer"].transform("max")
    nodes["layer"] = nodes["layer"].where(~grouped, top)
    sinks, neurons = (frame.assign(node=frame["node"].map(lambda n: rename.get(n, n))) for frame in (graph.sinks, graph.neurons))
    return _joined(graph, edges[~inside], nodes, sinks, neurons[~neurons["node"].isin(list(groups))])


def average(graphs: Sequence[Tables], by_position: bool = False) -> Tables:
    """The mean graph of a data set; its edges have a further column `frequency`, in what part of the graphs an edge is there.

    Args:
        graphs: one or more; prune or threshold them first, or every edge is in every graph.
        by_position: keep positions apart, for prompts of one length and template; tokens are then those of the first prompt where all
            agree, and the position's number elsewhere.

    Raises:
        RelevanceError: no graph, or prompts of several lengths by position.
    """
    if not graphs:
        raise RelevanceError("there is no graph to average")
    _check_kinds(graphs)
    if not by_position:
        graphs = [sum_positions(g) if g.by_position else g for g in graphs]
    elif len({len(g.tokens) for g in graphs}) > 1:
        raise RelevanceError("the prompts differ in length, so positions do not correspond; average with by_position=False")
    n = len(graphs)
    tokens = graphs[0].tokens
    if any(g.tokens != tokens for g in graphs):
        same = [len(set(column)) == 1 for column in zip(*(g.tokens for g in graphs), strict=False)]
        tokens = tuple(t if equal else str(i) for i, (t, equal) in enumerate(zip(tokens, same, strict=False)))
    tables = {}
    for name, keys in _KEYS.items():
        frames = [getattr(g, name) for g in graphs]
        if name == "nodes" and by_position:
            frames = [frame.assign(token=[tokens[p] for p in frame["position"]]) for frame in frames]
        grouped = pd.concat(frames, ignore_index=True).groupby(keys, sort=False, observed=True)["score"]
        tables[name] = (grouped.sum() / n).reset_index()
        if name == "edges":
            tables[name]["frequency"] = (grouped.count() / n).to_numpy()
    return replace(
        graphs[0],
        edges=_strongest_first(tables["edges"]),
        nodes=tables["nodes"],
        sinks=tables["sinks"],
        neurons=tables["neurons"],
        features=no_features(),
        tokens=tokens,
        intervals=_no_intervals(),
        value=sum(g.value for g in graphs) / n,
        info=graphs[0].info | {"average": f"over {n} prompts"},
    )


def diff(first: Tables, second: Tables) -> Tables:
    """See `FlowGraph.diff`. Its tables have further columns `first` and `second`, the two scores."""
    _check_kinds([first, second])
    if first.by_position != second.by_position:
        raise RelevanceError("one graph is by position and the other is not; call sum_positions() on it")
    if len(first.tokens) != len(second.tokens) and first.by_position:
        raise RelevanceError("the prompts differ in length, so positions do not correspond; compare their sum_positions()")
    tokens = tuple(a if a == b else f"{a}|{b}" for a, b in zip(first.tokens, second.tokens, strict=False))
    tables = {}
    for name, keys in _KEYS.items():
        on = [k for k in keys if k != "token"]
        both = getattr(first, name)[[*on, "score"]].merge(getattr(second, name)[[*on, "score"]], on=on, how="outer", suffixes=("_1", "_2"))
        both = both.rename(columns={"score_1": "first", "score_2": "second"})
        both[["first", "second"]] = both[["first", "second"]].fillna(0.0)
        both["score"] = both["first"] - both["second"]
        if "token" in keys:
            both.insert(on.index("position") + 1, "token", ["(all)" if p < 0 else tokens[p] for p in both["position"]])
        tables[name] = both
    info = first.info | {"diff": f"{first.info.get('ruleset', '')} less {second.info.get('ruleset', '')}"}
    tables["edges"] = _strongest_first(tables["edges"])
    return replace(
        first,
        **tables,
        features=no_features(),
        tokens=tokens,
        intervals=_no_intervals(),
        value=first.value - second.value,
        info=info,
    )


def _check_kinds(graphs: Sequence[FlowTables]) -> None:
    if len({graph.of_contributions for graph in graphs}) > 1:
        raise RelevanceError("some of these graphs are of relevance and others of contributions, which have other units")


def _joined(graph: Tables, edges: pd.DataFrame, nodes: pd.DataFrame, sinks: pd.DataFrame, neurons: pd.DataFrame) -> Tables:
    """Rows with the same keys added up."""
    tables = {"edges": edges, "nodes": nodes, "sinks": sinks, "neurons": neurons}
    summed = {name: frame.groupby(_KEYS[name], sort=False, observed=True)["score"].sum().reset_index() for name, frame in tables.items()}
    return replace(
        graph,
        edges=_strongest_first(summed["edges"]),
        nodes=summed["nodes"],
        sinks=summed["sinks"],
        neurons=summed["neurons"],
        features=no_features(),
        intervals=_no_intervals(),
    )


def _no_intervals() -> pd.DataFrame:
    """What is expected of a sum is not the sum of what is expected."""
    return pd.DataFrame(columns=list(INTERVALS))


def _strongest_first(edges: pd.DataFrame) -> pd.DataFrame:
    return edges.sort_values("score", key=lambda s: -s.abs(), kind="stable", ignore_index=True)
