"""How often each head is on the information flow routes of a data set (as in Ferrando and Voita 2024, arXiv 2403.00824)."""

from __future__ import annotations

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import find_node
from analyses.edges.wiring import wiring
from analyses.graph.build import each_graph
from analyses.graph.flow import FlowGraph
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs
from lens_relevance.inputs.targets import AnyTarget


@left_as_found
def head_routes(
    model: TransformerBridge,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    threshold: float = 0.04,
) -> pd.DataFrame:
    """Statistics of heads over the routes of prompts; the graph of one prompt is in memory at a time.

    Source: Ferrando and Voita 2024, arXiv 2403.00824.

    Args:
        inputs: prompts, as for `propagate`.
        target: of it only the position that it reads counts; by default the last one.
        threshold: of contributions, as in `flow_graph(kind="contribution")`.

    Returns:
        One row per head, the most frequent first: columns node; layer; head; on_route (share of the prompts in which it is on the route);
        importance (its largest contribution to a state by a single token, and 0 where it is not on the route, mean over prompts); through
        (part of the logits' states that flows through it, summed over positions, mean over prompts).

    Raises:
        RelevanceError: as `flow_graph`.
    """
    names = [name for layer in wiring(model).layers for name in layer.heads]
    total, n = pd.DataFrame(0.0, index=names, columns=["on_route", "importance", "through"]), 0
    graphs = each_graph(
        model,
        inputs,
        target,
        kind="contribution",
        rules=None,
        reference=None,
        by_position=True,
        threshold=threshold,
        dictionaries=(),
        n_features=0,
    )
    for graph in graphs:
        total, n = total.add(_of_one(graph), fill_value=0.0), n + 1
    mean = (total / n).loc[names].rename_axis("node").reset_index()
    nodes = [find_node(name) for name in mean["node"]]
    mean.insert(1, "layer", [node.layer for node in nodes if node is not None])
    mean.insert(2, "head", [node.head for node in nodes if node is not None])
    return mean.sort_values(["on_route", "through"], ascending=False, kind="stable", ignore_index=True)


def _of_one(graph: FlowGraph) -> pd.DataFrame:
    """The heads on the route of one prompt."""
    heads = graph.nodes[graph.nodes["component"] == "heads"].groupby("node")["score"].sum()
    importance = graph.edges.groupby("target")["score"].max().reindex(heads.index)
    return pd.DataFrame({"on_route": 1.0, "importance": importance, "through": heads})
