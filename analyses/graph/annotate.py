"""What the units of a graph write in the run that it is of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from transformer_lens.model_bridge import TransformerBridge

from analyses.components import FEATURES, find_node
from analyses.datasets.batches import strings_of
from analyses.describe.written_by_units import WRITERS, written_tokens
from analyses.dictionaries.labels import label_features
from analyses.graph.tables import EVERYWHERE, Tables, rows
from lens_relevance.dictionaries import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.prompt import Inputs, tokenize
from lens_relevance.sites import anatomy
from lens_relevance.sites.base import block_of

TOP = 3  # tokens of a feature's label


def annotated(graph: Tables, model: TransformerBridge, inputs: Inputs, dictionaries: Sequence[Dictionary]) -> Tables:
    """See `FlowGraph.annotated`."""
    tokens, _ = tokenize(model, inputs)
    if len(tokens) != 1 or tuple(strings_of(model, tokens[0].tolist())) != graph.tokens:
        raise RelevanceError(f"these inputs are not the prompt that the graph is of, which is {''.join(graph.tokens)!r}")
    if EVERYWHERE in set(graph.nodes["position"]):
        raise RelevanceError("this graph sums over positions, and what a unit writes is told at one: make it by position")
    units = [f"{row.node}@{row.position}" for row in rows(graph.nodes) if _writes(row.node)]
    units += [f"{row.node.removesuffix('.mlp')}N{row.neuron}@{row.position}" for row in rows(graph.neurons)]
    found = written_tokens(model, tokens, units)
    return replace(graph, labels=found.tokens | _of_features(graph, model, dictionaries), attention=found.attention)


def _of_features(graph: Tables, model: TransformerBridge, dictionaries: Sequence[Dictionary]) -> dict[str, str]:
    """For each feature that is a node the tokens that it raises most."""
    by_layer = {block_of(anatomy(model).canonical(one.point_out[0]))[1]: one for one in dictionaries}
    shown: defaultdict[int, list[tuple[int, str]]] = defaultdict(list)
    for row in rows(graph.nodes[graph.nodes["component"] == FEATURES]):
        node = find_node(row.node)
        if node is not None and node.feature is not None and node.layer in by_layer:
            shown[node.layer].append((node.feature, f"{row.node}@{row.position}"))
    labels: dict[str, str] = {}
    for layer, nodes in shown.items():
        features = sorted({feature for feature, _ in nodes})
        written = label_features(model, by_layer[layer], features, k=TOP).set_index("feature")["raises"]
        labels |= {unit: " ".join(repr(token) for token in written[feature].split(" | ")) for feature, unit in nodes}
    return labels


def _writes(name: str) -> bool:
    node = find_node(name)
    return node is not None and node.component in WRITERS
