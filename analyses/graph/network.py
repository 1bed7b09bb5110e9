"""A flow graph as arrays of integers, stage by stage, for everything that walks through it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from analyses.components import ERROR, FEATURES, LOGITS, SKIP, SOURCES, Node, find_node
from analyses.graph.tables import FlowTables
from lens_relevance.errors import RelevanceError

Nodes = Float[np.ndarray, " node"]


class Network:
    """Nodes are (name, position) pairs, numbered; edges keep the order of the graph's table.

    Attributes:
        keys: the pair of each node.
        source, target: node at each end of an edge.
        size: |score| of each edge.
        share: of each edge, of all that enters its target node.
        stage: of each node, its place in the order of computation.
        targets: nodes of the logits that something enters.
        inputs: of each node, True at embeddings and biases.
    """

    def __init__(self, graph: FlowTables) -> None:
        edges = graph.edges
        if edges.empty:
            raise RelevanceError("the graph has no edges")
        nodes = {name: find_node(name) for name in pd.unique(pd.concat([edges["source"], edges["target"]]))}
        groups = [name for name, node in nodes.items() if node is None]
        if groups:
            said = f"{groups[0]!r} is a group, which may make the graph cyclic (prune and search before grouping), or another tool's node"
            raise RelevanceError(f"paths through this graph cannot be searched: {said}")
        ends = pd.DataFrame(
            {
                "node": np.concatenate([edges["source"], edges["target"]]),
                "position": np.concatenate([edges["source_position"], edges["position"]]),
            }
        )
        code, keys = pd.MultiIndex.from_frame(ends).factorize()
        self.keys: list[tuple[str, int]] = [(str(name), int(position)) for name, position in keys]
        self.source, self.target = np.split(code, 2)
        self.size = edges["score"].abs().to_numpy(dtype=float)
        known = {name: node for name, node in nodes.items() if node is not None}
        stages: dict[str, float | int] = {name: _stage(node) for name, node in known.items() if node.component not in _OF_DICTIONARIES}
        _add_features(stages, known, edges)
        self.stage = np.array([stages[name] for name, _ in self.keys])
        self.inputs: Bool[np.ndarray, " node"] = self.stage == 0
        entering = np.bincount(self.target, self.size, len(self.keys))
        self.entering = entering
        self.share = self.size / np.where(entering > 0, entering, 1.0)[self.target]
        at_target = np.array([known[name].component == LOGITS for name, _ in self.keys])
        self.targets = np.flatnonzero(at_target & (entering > 0))
        if len(self.targets) == 0:
            raise RelevanceError("the target is disconnected: no edge with relevance enters `logits` in this graph")
        self._order = np.argsort(self.stage[self.target], kind="stable")
        self._bounds = np.unique(self.stage[self.target][self._order], return_index=True)[1]

    def __len__(self) -> int:
        return len(self.keys)

    def downwards(self) -> Iterator[Int[np.ndarray, " edge"]]:
        """Edges in batches by the stage of the node they enter, from the target down."""
        return iter(np.split(self._order, self._bounds[1:])[::-1])

    def upwards(self) -> Iterator[Int[np.ndarray, " edge"]]:
        """The same from the inputs up."""
        return iter(np.split(self._order, self._bounds[1:]))

    def start(self) -> Nodes:
        """1 shared out over the targets by what enters them."""
        mass = np.zeros(len(self))
        mass[self.targets] = self.entering[self.targets] / self.entering[self.targets].sum()
        return mass

    def through(self) -> Nodes:
        """Share of all paths that pass each node, when each node hands on what enters it in proportion to |score|."""
        mass = self.start()
        for edges in self.downwards():
            np.add.at(mass, self.source[edges], mass[self.target[edges]] * self.share[edges])
        return mass

    def trim(self, kept: Bool[np.ndarray, " edge"]) -> Bool[np.ndarray, " edge"]:
        """Kept edges without those that no input reaches."""
        alive, kept = self.inputs.copy(), kept.copy()
        for edges in self.upwards():
            kept[edges] &= alive[self.source[edges]]
            alive[self.target[edges[kept[edges]]]] = True
        return kept


_OF_DICTIONARIES = (FEATURES, SKIP)
_STAGES = {"resid": 0.5, "q": 1, "k": 1, "v": 1, "heads": 2, "resid_mid": 2.5, "mlp.in": 3, "mlp": 4, "resid_post": 4.25}


def _add_features(stages: dict[str, float | int], nodes: dict[str, Node], edges: pd.DataFrame) -> None:
    """Features of a layer come after what they read there: nothing (of the stream before attention), the heads, or the MLP."""
    of_dictionaries = {name: node.layer for name, node in nodes.items() if node.component in _OF_DICTIONARIES}
    after = {layer: 4.0 * layer + 0.5 for layer in of_dictionaries.values()}
    read = edges.loc[edges["target"].isin(list(of_dictionaries)), ["source", "target"]].drop_duplicates()
    for source, target in zip(read["source"], read["target"], strict=True):
        layer = of_dictionaries[target]
        if nodes[source].layer == layer and nodes[source].component != ERROR:
            after[layer] = max(after[layer], stages[source] + 0.25)
    stages |= {name: after[layer] for name, layer in of_dictionaries.items()}


def _stage(node: Node) -> float | int:
    """Place in the order of computation: every edge of a graph leads to a higher stage."""
    if node.component in (*SOURCES, ERROR):
        return 0
    return 10**9 if node.component == LOGITS else 4 * node.layer + _STAGES[node.component]
