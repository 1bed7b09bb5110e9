"""Flow graphs in the attribution-graph format that Neuronpedia and circuit-tracer share (JSON Schema draft 7, published with Neuronpedia).

Every node and edge of the graph is written, readers (`L4H1.q`) included. The listed neurons of an MLP stand between its input and its
output, with what the other neurons carry beside them. What the format has no field for is in fields of our own, which other readers pass
over: `name`, `score` and `sinks` of a node, `whole` of a link that neurons were split from, `lens_relevance` of the metadata.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analyses.components import Node, find_node
from analyses.graph.tables import EVERYWHERE, FlowTables, rows
from analyses.output_files import MARK
from lens_relevance._version import __version__
from lens_relevance.errors import RelevanceError
from lens_relevance.whole_files import write_whole

EMBEDDINGS = "E"  # the layer of what is below the first block
FEATURE_TYPES = {
    "embed": "embedding",
    "pos_embed": "position embedding",
    "bias": "bias",
    "heads": "attention head",
    "q": "query",
    "k": "key",
    "v": "value",
    "mlp": "mlp",
    "mlp.in": "mlp input",
    "neurons": "neuron",
    "logits": "logit",
    "features": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "skip": "skip connection",
}
STATES = {"resid": "residual stream", "resid_mid": "residual stream after attention", "resid_post": "residual stream after the block"}
OTHER_FEATURES = "other features"
_CODES = {component: code for code, component in enumerate(FEATURE_TYPES)}
_STEP = _CODES["features"]  # of indices; the codes of features, errors and skips are above it, where no component of a layer is
_CODES |= {component: code for code, component in enumerate(STATES)}  # those of embeddings and biases, which are in no layer


class Ids(NamedTuple):
    """What the numbers of nodes depend on. offset: of all but features, whose numbers are their own, as circuit-tracer has them."""

    n_layers: int
    offset: int


_CONTRIBUTORS = 10


def to_neuronpedia(
    graph: FlowTables,
    path: str | Path | None,
    *,
    slug: str,
    scan: str | None,
    token_prob: float | None,
) -> dict[str, Any]:
    """See `FlowGraph.to_neuronpedia`."""
    if EVERYWHERE in set(graph.nodes["position"]):
        raise RelevanceError("this graph sums over positions, and Neuronpedia's nodes stand at one: make it by position")
    named = {name: find_node(name) for name in graph.nodes["node"].unique()}
    if strange := [name for name, node in named.items() if node is None]:
        raise RelevanceError(f"{strange[0]!r} is a group of nodes, which has no layer; export the graph before it is grouped")
    known = [node for node in named.values() if node is not None]
    features = [node.feature for node in known if node.feature is not None]
    ids = Ids(1 + max([node.layer for node in known], default=-1), 1 + max(features) if features else 0)
    links, neurons = _links(graph, ids)
    influence = _influence(graph)
    sinks: defaultdict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for row in rows(graph.sinks):
        sinks[row.node, row.position][row.sink] = float(row.score)
    activations = {(row.node, row.position): float(row.activation) for row in rows(graph.features)}
    nodes = []
    for row in rows(graph.nodes):
        at = (row.node, row.position)
        node = _node(graph, row, ids, sinks=sinks[at], token_prob=token_prob)
        nodes.append(node | {"influence": influence.get(at), "activation": activations.get(at)})
    queries, keys = _contributors(graph, ids)
    pairs = _pairs(graph, ids)
    for node in nodes:
        if node["feature_type"] == "attention head":
            at = (node["name"], node["ctx_idx"])
            node["qk_tracing_results"] = {
                "pair_wise_contributors": _strongest(pairs[at]),
                "top_q_marginal_contributors": _strongest(queries[at]),
                "top_k_marginal_contributors": _strongest(keys[at]),
            }
    content = {
        "metadata": {
            "slug": slug,
            "scan": graph.info.get("model", "unknown") if scan is None else scan,
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": "".join(graph.tokens),
            "schema_version": 1,
            "info": {"generator": {"name": "lens_relevance", "version": __version__}, "description": MARK},
            "generation_settings": {key: str(value) for key, value in graph.info.items()},
            "lens_relevance": {"value": graph.value, "info": graph.info},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes + neurons,
        "links": links,
    }
    if path is not None:
        text = json.dumps(content, ensure_ascii=False, allow_nan=False)
        write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return content


def node_id(name: str, position: int, ids: Ids) -> str:
    """`layer_feature_position`, as circuit-tracer writes it; feature tells the components of a layer apart."""
    node = find_node(name)
    assert node is not None
    return f"{_layer(node, ids)}_{_number(node, ids)}_{position}"


def _layer(node: Node, ids: Ids) -> str:
    return str(ids.n_layers + 1) if node.component == "logits" else EMBEDDINGS if node.layer < 0 else str(node.layer)


def _number(node: Node, ids: Ids) -> int:
    """A number of its own for each component of a layer."""
    if (own := node.feature if node.token is None else node.token) is not None:
        return own
    index = node.neuron if node.neuron is not None else node.head if node.head is not None else 0
    return ids.offset + index * _STEP + _CODES[node.component]


def _paired(layer: int, feature: int) -> int:
    """Layer and feature in one number (Cantor's pairing), which is how circuit-tracer numbers features over all layers."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _shown(name: str, position: int, ids: Ids, *, score: float, label: str) -> dict[str, Any]:
    """The fields that every node has."""
    node = find_node(name)
    assert node is not None
    layer, feature = _layer(node, ids), _number(node, ids)
    kind = OTHER_FEATURES if node.component == "features" and node.feature is None else (FEATURE_TYPES | STATES)[node.component]
    return {
        "node_id": f"{layer}_{feature}_{position}",
        "feature": feature if node.feature is None else _paired(node.layer, node.feature),
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "jsNodeId": f"{layer}_{feature}-{position}",
        "clerp": f"{name}: {label}" if label else name,
        "influence": None,
        "activation": None,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "is_target_logit": node.component == "logits",
        "name": name,
        "score": score,
    }


def _node(graph: FlowTables, row: Any, ids: Ids, *, sinks: dict[str, float], token_prob: float | None) -> dict[str, Any]:
    label = graph.labels.get(f"{row.node}@{row.position}", "")
    label = f"writes {label}" if label else ""
    if row.component == "embed":
        label = repr(graph.tokens[row.position])
    if row.node == "logits":
        label = graph.info.get("target", "target")
    shown = _shown(row.node, int(row.position), ids, score=float(row.score), label=label)
    return shown | {"token_prob": 0.0 if token_prob is None or row.component != "logits" else token_prob, "sinks": sinks}


def _links(graph: FlowTables, ids: Ids) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All edges as links, those into an MLP split over its listed neurons, and these neurons as nodes."""
    inside: defaultdict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for row in rows(graph.neurons):
        inside[row.node, row.position].append((int(row.neuron), float(row.score)))
    links, neurons = [], []
    for row in rows(graph.edges):
        ends = node_id(row.source, row.source_position, ids), node_id(row.target, row.position, ids)
        listed = inside.pop((row.target, row.position), []) if str(row.source).endswith(".mlp.in") else []
        rest = float(row.score) - sum(score for _, score in listed)
        links.append({"source": ends[0], "target": ends[1], "weight": rest} | ({"whole": float(row.score)} if listed else {}))
        for neuron, score in listed:
            name = f"{row.target.removesuffix('.mlp')}N{neuron}"
            writes = graph.labels.get(f"{name}@{row.position}", "")
            neurons.append(_shown(name, int(row.position), ids, score=score, label=f"writes {writes}" if writes else ""))
            between = neurons[-1]["node_id"]
            links += [{"source": ends[0], "target": between, "weight": score}, {"source": between, "target": ends[1], "weight": score}]
    return links, neurons


def _influence(graph: FlowTables) -> dict[tuple[str, int], float]:
    """For heads, MLPs and readers: the share of all their |relevance| that they and the stronger ones hold, as circuit-tracer counts it."""
    inner = graph.nodes[~graph.nodes["component"].isin(["embed", "logits"])].sort_values("score", key=lambda s: -s.abs(), kind="stable")
    size = inner["score"].abs()
    shares = size.cumsum() / (size.sum() or 1.0)
    return dict(zip(zip(inner["node"], inner["position"], strict=True), shares.tolist(), strict=True))


_Listed = list[tuple[str, float]]


def _contributors(graph: FlowTables, ids: Ids) -> tuple[Mapping[tuple[str, int], _Listed], Mapping[tuple[str, int], _Listed]]:
    """For each head and position: what its query there was made of, and its keys, with the relevance that came by each.

    A key serves several queries: of what a writer gives it, each query gets the share that it gets of all that leaves the key.
    """
    edges = graph.edges.assign(head=graph.edges["target"].astype(str).str.rpartition(".")[0])
    readers = edges[edges["target"].astype(str).str.fullmatch(r"L\d+H\d+\.[qk]")]
    into = {at: part for at, part in readers.groupby(["target", "position"], observed=True)}
    queries: defaultdict[tuple[str, int], _Listed] = defaultdict(list)
    keys: defaultdict[tuple[str, int], _Listed] = defaultdict(list)
    inner = edges[edges["source"].astype(str).str.fullmatch(r"L\d+H\d+\.[qk]")]
    stays = graph.sinks.groupby(["node", "position"])["score"].sum()
    leaves = graph.nodes.set_index(["node", "position"])["score"].add(stays, fill_value=0.0)
    for row in rows(inner):
        entering = into.get((row.source, row.source_position))
        whole = leaves[row.source, row.source_position]
        if entering is None or whole == 0:
            continue
        found = queries if row.source.endswith(".q") else keys
        found[row.target, row.position] += [
            (node_id(writer.source, writer.source_position, ids), float(writer.score * row.score / whole)) for writer in rows(entering)
        ]
    return queries, keys


def _pairs(graph: FlowTables, ids: Ids) -> Mapping[tuple[str, int], list[tuple[str, str, float]]]:
    """For each head and position: its query there and each of its keys, with the relevance that enters by that key."""
    known = {(row.node, row.position) for row in rows(graph.nodes)}
    pairs: defaultdict[tuple[str, int], list[tuple[str, str, float]]] = defaultdict(list)
    for row in rows(graph.edges):
        query = f"{row.target}.q"
        if row.source == f"{row.target}.k" and (query, row.position) in known:
            ends = node_id(query, row.position, ids), node_id(row.source, row.source_position, ids)
            pairs[row.target, row.position].append((*ends, float(row.score)))
    return pairs


def _strongest(listed: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(item) for item in sorted(listed, key=lambda item: -abs(item[-1]))[:_CONTRIBUTORS]]
