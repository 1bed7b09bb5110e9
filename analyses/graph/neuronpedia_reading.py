"""Attribution graphs that Neuronpedia, circuit-tracer or we wrote, read as flow graphs, to be drawn and asked offline."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.components import find_node
from analyses.graph.tables import Tables, no_features, nodes_frame, rows
from lens_relevance.errors import RelevanceError
from lens_relevance.json_files import only, read_json
from lens_relevance.shown_text import visible

_NODE = ("node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp")
_NODE_MAY = (
    *("influence", "activation", "qk_tracing_results", "token_prob", "is_target_logit", "run_idx", "reverse_ctx_idx"),
    *("name", "score", "sinks", "isTargetLogit", "nodeId", "token", "lorsa_pattern", "sae_name"),
)
_NEURON = re.compile(r"(L\d+)N(\d+)")


def from_neuronpedia(kind: type[Tables], path: str | Path, scan: str | None) -> Tables:
    """See `FlowGraph.from_neuronpedia`."""
    where = visible(str(path))
    content = only(
        read_json(path, "an attribution graph"), where, needed=("metadata", "qParams", "nodes", "links"), allowed=("qk_only_nodes",)
    )
    metadata = content["metadata"]
    if not isinstance(metadata, dict) or not isinstance(metadata.get("scan"), str) or not isinstance(metadata.get("prompt_tokens"), list):
        raise RelevanceError(f"{where}: the metadata lack scan or prompt_tokens")
    if scan is not None and metadata["scan"] != scan:
        raise RelevanceError(f"{where} is a graph of the model {visible(repr(metadata['scan']))}, not of {scan!r}")
    tokens = tuple(_text(token, f"{where}: prompt_tokens") for token in metadata["prompt_tokens"])
    nodes = _nodes(content["nodes"], where, len(tokens))
    links = _links(content["links"], where, nodes)
    ours = metadata.get("lens_relevance")
    ours = ours if isinstance(ours, dict) else {}
    value = ours.get("value", sum(link["weight"] for link in links if nodes[link["target"]]["feature_type"] == "logit"))
    info = ours.get("info", {"model": metadata["scan"], "target": _target(nodes), "ruleset": _generator(metadata)})
    edges, neurons = _split(nodes, links)
    frame = pd.DataFrame([{"node": n["name"], "position": n["ctx_idx"], "score": n["score"]} for n in nodes.values() if not _is_neuron(n)])
    sinks = [
        {"node": n["name"], "position": n["ctx_idx"], "sink": str(sink), "score": _number(score, f"{where}: sinks")}
        for n in nodes.values()
        for sink, score in (n.get("sinks") or {}).items()
    ]
    features = [
        {"node": n["name"], "position": n["ctx_idx"], "activation": _number(n["activation"], f"{where}: the activation of a node")}
        for n in nodes.values()
        if n.get("activation") is not None and not _is_neuron(n)
    ]
    named = nodes_frame(frame, tokens)
    foreign = {(n["name"], n["ctx_idx"]): n for n in nodes.values() if find_node(n["name"]) is None}
    for i, row in enumerate(rows(named)):
        if (node := foreign.get((row.node, row.position))) is not None:
            named.loc[i, "layer"] = int(node["layer"]) if str(node["layer"]).isdecimal() else -1
    labels = {f"{n['name']}@{n['ctx_idx']}": label for n in nodes.values() if (label := _label(n))}
    return kind(
        edges=pd.DataFrame(edges, columns=["source", "target", "position", "source_position", "score"]),
        nodes=named,
        sinks=pd.DataFrame(sinks, columns=["node", "position", "sink", "score"]),
        neurons=pd.DataFrame(neurons, columns=["node", "position", "neuron", "score"]),
        features=pd.DataFrame(features) if features else no_features(),
        tokens=tokens,
        value=_number(value, f"{where}: value"),
        info={str(key): str(text) for key, text in info.items()},
        labels=labels,
    )


def _nodes(listed: Any, where: str, n_pos: int) -> dict[str, dict[str, Any]]:
    """Nodes by their ids, each with a name and a score."""
    if not isinstance(listed, list) or not listed:
        raise RelevanceError(f"{where}: nodes are no list, or none")
    nodes: dict[str, dict[str, Any]] = {}
    for i, given in enumerate(listed):
        node = dict(only(given, f"{where}: node {i}", needed=_NODE[:5], allowed=_NODE[5:] + _NODE_MAY))
        node["node_id"] = _text(node["node_id"], f"{where}: node {i}")
        if node["node_id"] in nodes:
            raise RelevanceError(f"{where}: the node {visible(repr(node['node_id']))} is there twice")
        if type(node["ctx_idx"]) is not int or not 0 <= node["ctx_idx"] < n_pos:
            raise RelevanceError(f"{where}: node {i} stands at position {str(node['ctx_idx'])[:20]}, and the prompt has {n_pos} tokens")
        node["score"] = _number(node.get("score", 0.0), f"{where}: the score of node {i}")
        node["name"] = _text(node.get("name") or _foreign_name(node), f"{where}: the name of node {i}")
        nodes[node["node_id"]] = node
    return nodes


def _foreign_name(node: dict[str, Any]) -> str:
    """A name for a node that another tool wrote."""
    kind, layer = str(node["feature_type"]), node["layer"]
    if kind == "embedding":
        return "embed"
    if kind == "logit":
        return f"logit {node['feature']}"
    if "error" in kind:
        return f"L{layer}.error" if kind == "mlp reconstruction error" else f"L{layer}.{kind}"
    return f"L{layer}F{str(node['node_id']).split('_')[1] if str(node['node_id']).count('_') == 2 else node['feature']}"


def _links(listed: Any, where: str, nodes: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    if not isinstance(listed, list):
        raise RelevanceError(f"{where}: links are no list")
    for i, link in enumerate(listed):
        only(link, f"{where}: link {i}", needed=("source", "target", "weight"), allowed=("whole",))
        if unknown := [end for end in ("source", "target") if not isinstance(link[end], str) or link[end] not in nodes]:
            raise RelevanceError(f"{where}: link {i} has the {unknown[0]} {visible(repr(link[unknown[0]]))[:60]}, which is no node")
        for name in ("weight", "whole"):
            _number(link.get(name, 0.0), f"{where}: the {name} of link {i}")
    return listed


def _split(nodes: dict[str, dict[str, Any]], links: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Links as edges, and those by way of our neurons as rows of the neurons' table."""
    edges, neurons = [], []
    for link in links:
        source, target = nodes[link["source"]], nodes[link["target"]]
        if _is_neuron(source):
            match = _NEURON.fullmatch(source["name"])
            assert match is not None
            neurons.append(
                {"node": f"{match[1]}.mlp", "position": source["ctx_idx"], "neuron": int(match[2]), "score": float(link["weight"])}
            )
        elif not _is_neuron(target):
            ends = {"source": source["name"], "target": target["name"], "position": target["ctx_idx"], "source_position": source["ctx_idx"]}
            edges.append(ends | {"score": float(link.get("whole", link["weight"]))})
    return edges, neurons


def _is_neuron(node: dict[str, Any]) -> bool:
    return node["feature_type"] == "neuron" and _NEURON.fullmatch(node["name"]) is not None


def _label(node: dict[str, Any]) -> str:
    """Our label without what `to_neuronpedia` set before it; another tool's as it is."""
    clerp = str(node.get("clerp") or "")
    start = f"{node['name']}: writes "
    return clerp.removeprefix(start) if clerp.startswith(start) else "" if "name" in node and clerp.startswith(node["name"]) else clerp


def _target(nodes: dict[str, dict[str, Any]]) -> str:
    return next((str(node["clerp"]) for node in nodes.values() if node.get("is_target_logit")), "target")


def _generator(metadata: dict[str, Any]) -> str:
    info = metadata.get("info")
    generator = info.get("generator") if isinstance(info, dict) else None
    return str(generator.get("name", "unknown")) if isinstance(generator, dict) else "unknown"


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RelevanceError(f"{where}: {visible(repr(value))[:60]} is no text")
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RelevanceError(f"{where} is {visible(repr(value))[:60]}, not a number")
    return float(value)
