"""Flow graphs as networkx graphs, GraphML and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import pandas as pd

from analyses.graph.tables import FlowTables, Tables
from analyses.output_files import MARK
from lens_relevance.errors import RelevanceError
from lens_relevance.whole_files import write_whole

_TABLES = ("edges", "nodes", "sinks", "neurons")
_FORMAT = "lens_relevance flow graph 1"


def to_networkx(graph: FlowTables) -> nx.DiGraph:
    """See `FlowGraph.to_networkx`."""
    result = nx.DiGraph(value=graph.value, **graph.info)
    for row in graph.nodes.to_dict("records"):
        result.add_node(_key(row["node"], row["position"]), **{str(k): v for k, v in row.items()})
    for row in graph.edges.to_dict("records"):
        ends = _key(row["source"], row["source_position"]), _key(row["target"], row["position"])
        result.add_edge(*ends, **{str(k): v for k, v in row.items() if k not in ("source", "target")})
    return result


def to_graphml(graph: FlowTables, path: str | Path) -> None:
    """See `FlowGraph.to_graphml`."""
    network = to_networkx(graph)
    network.graph["generator"] = MARK
    write_whole(path, lambda beside: nx.write_graphml(network, str(beside)))


def to_json(graph: FlowTables, path: str | Path | None) -> str:
    """See `FlowGraph.to_json`. Floats are written with all their digits."""
    content = {"format": _FORMAT, "generator": MARK, "tokens": list(graph.tokens), "value": graph.value, "info": graph.info}
    content |= {name: {str(c): getattr(graph, name)[c].tolist() for c in getattr(graph, name).columns} for name in _TABLES}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    if path is not None:
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return text


def from_json(kind: type[Tables], source: str | Path) -> Tables:
    """See `FlowGraph.from_json`."""
    text = source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text(encoding="utf-8")
    content = json.loads(text)
    if content.get("format") != _FORMAT:
        raise RelevanceError("this JSON was not written by FlowGraph.to_json")
    tables = {name: pd.DataFrame(content[name]) for name in _TABLES}
    return kind(**tables, tokens=tuple(content["tokens"]), value=content["value"], info=content["info"])


def _key(name: str, position: int) -> str:
    return name if position < 0 else f"{name}@{position}"
