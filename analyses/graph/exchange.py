"""Flow graphs as networkx graphs, GraphML and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd

from analyses.graph.tables import EDGE_KEYS, INTERVALS, FlowTables, Tables
from analyses.output_files import MARK
from lens_relevance.errors import RelevanceError
from lens_relevance.shown_text import visible
from lens_relevance.whole_files import write_whole

_TABLES = {
    "edges": (*EDGE_KEYS, "score"),
    "nodes": ("node", "component", "layer", "head", "position", "token", "score"),
    "sinks": ("node", "position", "sink", "score"),
    "neurons": ("node", "position", "neuron", "score"),
    "attention": ("node", "position", "source_position", "attention"),
    "intervals": INTERVALS,
    "features": ("node", "position", "activation"),
}
_LATER = ("attention", "intervals", "features")  # files of earlier versions have none
_FORMAT = "lens_relevance flow graph 1"


def to_networkx(graph: FlowTables) -> nx.DiGraph:
    """See `FlowGraph.to_networkx`."""
    result = nx.DiGraph(value=graph.value, **graph.info)
    for row in graph.nodes.to_dict("records"):
        result.add_node(_key(row["node"], row["position"]), **{str(k): v for k, v in row.items()})
    for row in graph.intervals.to_dict("records"):
        if (key := _key(row["node"], row["position"])) in result:
            result.nodes[key].update({name: row[name] for name in ("low", "high", "reliable")})
    for row in graph.features.to_dict("records"):
        result.nodes[_key(row["node"], row["position"])]["activation"] = row["activation"]
    for row in graph.edges.to_dict("records"):
        ends = _key(row["source"], row["source_position"]), _key(row["target"], row["position"])
        result.add_edge(*ends, **{str(k): v for k, v in row.items() if k not in ("source", "target")})
    return result


def to_graphml(graph: FlowTables, path: str | Path) -> None:
    """See `FlowGraph.to_graphml`."""
    network = to_networkx(graph)
    for attributes in (network.graph, *network.nodes.values(), *network.edges.values()):  # XML forbids control characters
        attributes |= {key: visible(value) for key, value in attributes.items() if isinstance(value, str)}
    network.graph["generator"] = MARK
    write_whole(path, lambda beside: nx.write_graphml(network, str(beside)))


def to_json(graph: FlowTables, path: str | Path | None) -> str:
    """See `FlowGraph.to_json`. Floats are written with all their digits."""
    content = {"format": _FORMAT, "generator": MARK, "tokens": list(graph.tokens), "value": graph.value, "info": graph.info}
    content |= {"labels": graph.labels}
    content |= {name: {str(c): getattr(graph, name)[c].tolist() for c in getattr(graph, name).columns} for name in _TABLES}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    if path is not None:
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return text


def from_json(kind: type[Tables], source: str | Path) -> Tables:
    """See `FlowGraph.from_json`."""
    is_text = isinstance(source, str) and source.lstrip().startswith("{")
    name = "this JSON" if is_text else str(source)
    try:
        content = json.loads(str(source) if is_text else Path(source).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise RelevanceError(f"{name} was not written by FlowGraph.to_json")
        empty: dict[str, Any] = {table: {column: [] for column in _TABLES[table]} for table in _LATER}
        tables = {table: pd.DataFrame((empty | content)[table]) for table in _TABLES}
        for table, columns in _TABLES.items():
            if missing := [column for column in columns if column not in tables[table].columns]:
                raise KeyError(f"{table} lack the column {missing[0]}")
        return kind(
            **tables, tokens=tuple(content["tokens"]), value=content["value"], info=content["info"], labels=content.get("labels", {})
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, RelevanceError):
            raise
        raise RelevanceError(f"{name} cannot be read as a flow graph ({type(error).__name__}: {error})") from error


def _key(name: str, position: int) -> str:
    return name if position < 0 else f"{name}@{position}"
