"""The tables that a flow graph is made of, and what every operation on them needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from analyses.components import Node, find_node
from lens_relevance.errors import RelevanceError

EDGE_KEYS = ["source", "target", "position", "source_position"]
EVERYWHERE = -1
"""The position of what is summed over positions."""
INTERVALS = ("node", "position", "low", "high", "reliable")


@dataclass(frozen=True, eq=False)
class FlowTables:
    """A graph of signed relevance, as tables. Scores have the units of the target; of contributions they are shares (see
    analyses/graph/routes.py), and the nodes are states of the stream (`L3.resid`) besides heads, MLPs and inputs.

    Attributes:
        edges: columns source, target, position, source_position, score. From writers (`embed`, `pos_embed`, `bias`, `L3H5`, `L3.mlp`) to
            readers (`L4H1.q`, `.k`, `.v`, `L4.mlp.in`, `logits`) at one position; and inside components from readers to `L4H1` and
            `L4.mlp`, where k and v lead from `source_position` to `position`.
        nodes: columns node, component, layer, head (-1 where there is none), position, token, score: relevance at the output of a writer,
            relevance that enters a reader.
        sinks: columns node, position, sink, score: what stays (`bias`, `norm`, `softmax`, `product`, `activation`). A head's, MLP's or the
            logits' score is the sum of the edges that enter it plus its sinks; what leaves a reader is its score plus its sinks.
        neurons: columns node, position, neuron, score: the strongest neurons of each MLP.
        features: columns node, position, activation: the values of the features of a dictionary that are nodes.
        tokens: one string per position.
        value: the target, less that of the reference run where there is one.
        info: model, ruleset, target, reference and versions.
        labels: what units write here (`L11H3@14`: "' Mary' ' Maria'"), once `FlowGraph.annotated` has asked the model.
        attention: columns node, position, source_position, attention: where heads look, from the same.
        intervals: columns node, position, low, high, reliable: where the effect of patching a head, an MLP or an embedding is expected, of
            a graph between two prompts (see `analyses.graph.intervals`); none for edges, and none once graphs are joined or compared.

    Where positions are summed over, `position` is -1.
    """

    edges: pd.DataFrame
    nodes: pd.DataFrame
    sinks: pd.DataFrame
    neurons: pd.DataFrame
    tokens: tuple[str, ...]
    value: float
    info: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    attention: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["node", "position", "source_position", "attention"]))
    intervals: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(INTERVALS)))
    features: pd.DataFrame = field(default_factory=lambda: no_features())

    def __post_init__(self) -> None:
        for name in ("edges", "nodes"):
            bad = getattr(self, name).loc[lambda frame: ~np.isfinite(frame["score"])]
            if len(bad):
                raise RelevanceError(f"{len(bad)} {name} have a score that is NaN or infinite, the first is {bad.iloc[0].to_dict()}")

    @property
    def of_contributions(self) -> bool:
        """Whether edges are contributions to the states of the stream, and not relevance."""
        return self.info.get("kind") == "contribution"

    @property
    def by_position(self) -> bool:
        """Whether positions are told apart, and not summed over."""
        return not bool((self.nodes["position"] == EVERYWHERE).all())


Tables = TypeVar("Tables", bound=FlowTables)


def with_edges(graph: Tables, edges: pd.DataFrame) -> Tables:
    """The graph of some of its edges and the nodes at their ends. Scores of nodes stay those of the whole graph."""
    ends = pd.concat([_ends(edges, "source", "source_position"), _ends(edges, "target", "position")]).drop_duplicates()

    def at_ends(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.merge(ends, on=["node", "position"]).reset_index(drop=True)

    nodes, sinks, neurons = (at_ends(frame) for frame in (graph.nodes, graph.sinks, graph.neurons))
    intervals = at_ends(graph.intervals) if len(graph.intervals) else graph.intervals
    features = at_ends(graph.features) if len(graph.features) else graph.features
    return replace(
        graph,
        edges=edges.reset_index(drop=True),
        nodes=nodes,
        sinks=sinks,
        neurons=neurons,
        intervals=intervals,
        features=features,
    )


def no_features() -> pd.DataFrame:
    """The table of features of a graph without any."""
    return pd.DataFrame(columns=["node", "position", "activation"])


def nodes_frame(nodes: pd.DataFrame, tokens: Sequence[str]) -> pd.DataFrame:
    """Columns node, component, layer, head, position, token, score from node, position, score."""
    parsed = {name: find_node(name) or Node("group") for name in nodes["node"].unique()}
    token = {i: text for i, text in enumerate(tokens)} | {EVERYWHERE: "(all)"}
    return pd.DataFrame(
        {
            "node": nodes["node"].to_numpy(),
            "component": [parsed[n].component for n in nodes["node"]],
            "layer": [parsed[n].layer for n in nodes["node"]],
            "head": [-1 if parsed[n].head is None else parsed[n].head for n in nodes["node"]],
            "position": nodes["position"].to_numpy(),
            "token": [token[p] for p in nodes["position"]],
            "score": nodes["score"].to_numpy(),
        }
    )


def rows(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a table, with its columns as attributes."""
    return iter(frame.itertuples(index=False))


def _ends(edges: pd.DataFrame, name: str, position: str) -> pd.DataFrame:
    return edges[[name, position]].drop_duplicates().set_axis(["node", "position"], axis=1)
