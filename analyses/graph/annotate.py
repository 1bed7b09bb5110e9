"""What the units of a graph write in the run that it is of."""

from __future__ import annotations

from dataclasses import replace

from transformer_lens.model_bridge import TransformerBridge

from analyses.components import find_node
from analyses.datasets.batches import strings_of
from analyses.describe.written_by_units import WRITERS, written_tokens
from analyses.graph.tables import EVERYWHERE, Tables, rows
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.prompt import Inputs, tokenize


def annotated(graph: Tables, model: TransformerBridge, inputs: Inputs) -> Tables:
    """See `FlowGraph.annotated`."""
    tokens, _ = tokenize(model, inputs)
    if len(tokens) != 1 or tuple(strings_of(model, tokens[0].tolist())) != graph.tokens:
        raise RelevanceError(f"these inputs are not the prompt that the graph is of, which is {''.join(graph.tokens)!r}")
    if EVERYWHERE in set(graph.nodes["position"]):
        raise RelevanceError("this graph sums over positions, and what a unit writes is told at one: make it by position")
    units = [f"{row.node}@{row.position}" for row in rows(graph.nodes) if _writes(row.node)]
    units += [f"{row.node.removesuffix('.mlp')}N{row.neuron}@{row.position}" for row in rows(graph.neurons)]
    found = written_tokens(model, tokens, units)
    return replace(graph, labels=found.tokens, attention=found.attention)


def _writes(name: str) -> bool:
    node = find_node(name)
    return node is not None and node.component in WRITERS
