"""FlowGraph: relevance flowing through a model, as tables of nodes and edges with the questions one asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from analyses.components import Node, find_node
from analyses.graph import aggregate, exchange, paths, prune
from lens_relevance.errors import RelevanceError

KEYS = ["source", "target", "position", "source_position"]
EVERYWHERE = -1


@dataclass(frozen=True, eq=False)
class FlowGraph:
    """A graph of signed relevance. Scores have the units of the target.

    Attributes:
        edges: columns source, target, position, source_position, score. From writers (`embed`, `pos_embed`, `bias`, `L3H5`, `L3.mlp`) to
            readers (`L4H1.q`, `.k`, `.v`, `L4.mlp.in`, `logits`) at one position; and inside components from readers to `L4H1` and
            `L4.mlp`, where k and v lead from `source_position` to `position`.
        nodes: columns node, component, layer, head (-1 where there is none), position, token, score: relevance at the output of a writer,
            relevance that enters a reader.
        sinks: columns node, position, sink, score: what stays (`bias`, `norm`, `softmax`, `product`, `activation`). A head's, MLP's or the
            logits' score is the sum of the edges that enter it plus its sinks; what leaves a reader is its score plus its sinks.
        neurons: columns node, position, neuron, score: the strongest neurons of each MLP.
        tokens: one string per position. value: the target, less that of the reference run where there is one.
        info: model, ruleset, target, reference and versions.

    Where positions are summed over, `position` is -1.
    """

    edges: pd.DataFrame
    nodes: pd.DataFrame
    sinks: pd.DataFrame
    neurons: pd.DataFrame
    tokens: tuple[str, ...]
    value: float
    info: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("edges", "nodes"):
            bad = getattr(self, name).loc[lambda frame: ~np.isfinite(frame["score"])]
            if len(bad):
                raise RelevanceError(f"{len(bad)} {name} have a score that is NaN or infinite, the first is {bad.iloc[0].to_dict()}")

    @property
    def by_position(self) -> bool:
        return not bool((self.nodes["position"] == EVERYWHERE).all())

    def __repr__(self) -> str:
        return f"FlowGraph({len(self.edges)} edges, {len(self.nodes)} nodes, {self.info.get('ruleset', '')}, {self.info.get('target', '')})"

    # ---- choosing

    def above(self, threshold: float) -> FlowGraph:
        """Edges with |score| of at least `threshold`; raises RelevanceError where there are none."""
        kept = self.edges[self.edges["score"].abs() >= threshold]
        if kept.empty:
            strongest = float(self.edges["score"].abs().max()) if len(self.edges) else 0.0
            raise RelevanceError(f"threshold {threshold:g} removes every edge; the strongest has |score| {strongest:.3g}")
        return self.with_edges(kept)

    def prune(self, keep: float | None = None, top: int | None = None, min_share: float | None = None) -> FlowGraph:
        """A connected subgraph, grown from the target downwards; every edge left lies on a path from an input to the target.

        Give one of: keep, for each node the strongest edges that enter it, until they carry this share of the |relevance| entering;
        top, the strongest edges one by one, each into a node that is there already (at most this many: dead ends are taken off);
        min_share, edges with at least this share of the |relevance| that enters the target.

        Raises RelevanceError for an empty graph, a target that nothing enters, and where nothing would be left.
        """
        return self.with_edges(self.edges[prune.mask(self, keep, top, min_share=min_share)])

    def with_edges(self, edges: pd.DataFrame) -> FlowGraph:
        """The graph of some of its edges and the nodes at their ends. Scores of nodes stay those of the whole graph."""
        ends = pd.concat([_ends(edges, "source", "source_position"), _ends(edges, "target", "position")]).drop_duplicates()

        def here(frame: pd.DataFrame) -> pd.DataFrame:
            return frame.merge(ends, on=["node", "position"]).reset_index(drop=True)

        return replace(self, edges=edges.reset_index(drop=True), nodes=here(self.nodes), sinks=here(self.sinks), neurons=here(self.neurons))

    # ---- asking

    def paths(self, n: int = 10) -> pd.DataFrame:
        """The n strongest paths from an input to the target: columns path, share, weakest.

        share: of all relevance by its absolute value, the part that takes this path, if each node passes on what enters it in proportion to
        |score| (over all paths shares add up to 1). weakest: the signed score of its weakest edge.
        """
        return paths.strongest(self, n)

    def bottlenecks(self, n: int = 10) -> pd.DataFrame:
        """Nodes through which most flows: columns node, position, through, dominates.

        through: share of all paths, weighted as in `paths`, that pass the node. dominates: how many nodes reach the target only through it
        (dominator tree from the target). Prune first: dominators of millions of edges take minutes.
        """
        return paths.bottlenecks(self, n)

    def open(self, node: str, position: int | None = None) -> pd.DataFrame:
        """What is inside a node: the strongest neurons of an MLP; for a head the edges from its q, k, v and source tokens.

        Of a node without an inside (a reader, a mixture of experts) the edges that enter it.
        """
        if node not in set(self.nodes["node"]):
            raise RelevanceError(
                f"there is no node {node!r} in this graph; its nodes are like {', '.join(self.nodes['node'].unique()[:5])}"
            )
        mlp = node in set(self.neurons["node"])
        inside = self.neurons[self.neurons["node"] == node] if mlp else self.edges[self.edges["target"] == node]
        inside = inside if position is None else inside[inside["position"] == position]
        if not mlp:
            inside = inside.assign(token=[self.token(p) for p in inside["source_position"]])
        return inside.sort_values("score", key=lambda s: -s.abs(), kind="stable", ignore_index=True)

    def token(self, position: int) -> str:
        """The token at a position, or `(all)` where positions are summed over."""
        return "(all)" if position == EVERYWHERE else self.tokens[position]

    # ---- joining and comparing

    def sum_positions(self) -> FlowGraph:
        """Edges, nodes and sinks summed over positions."""
        return aggregate.sum_positions(self)

    def group(self, groups: Mapping[str, Sequence[str]]) -> FlowGraph:
        """Heads and MLPs joined into named groups (`{"name movers": ["L9H9", "L9H6"]}`), readers too; edges within one go."""
        return aggregate.group(self, groups)

    def diff(self, other: FlowGraph) -> FlowGraph:
        """This graph less another (another prompt, another ruleset), edge by edge and node by node; what one of them lacks counts 0."""
        return aggregate.diff(self, other)

    def __eq__(self, other: object) -> bool:
        """Same tokens, value, nodes, edges, sinks and neurons, exactly, in whatever order."""
        if not isinstance(other, FlowGraph):
            return NotImplemented
        if self.tokens != other.tokens or self.value != other.value:
            return False
        return all(_ordered(getattr(self, n)).equals(_ordered(getattr(other, n))) for n in ("edges", "nodes", "sinks", "neurons"))

    __hash__ = None  # type: ignore[assignment]

    # ---- giving away

    def to_networkx(self) -> nx.DiGraph:
        """Nodes `L4H1@5` (`L4H1` where positions are summed over) and edges with the columns of the tables as attributes."""
        return exchange.to_networkx(self)

    def to_graphml(self, path: str | Path) -> None:
        """Write GraphML, which Gephi, Cytoscape and networkx read."""
        exchange.to_graphml(self, path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything as JSON, also written to `path`; `from_json` gives back an equal graph."""
        return exchange.to_json(self, path)

    @classmethod
    def from_json(cls, source: str | Path) -> FlowGraph:
        """Read what `to_json` wrote: the text itself, or a path."""
        return exchange.from_json(cls, source)

    def show(self, shown: int = 100) -> Any:
        """The flow view: tokens along x, layers up y. shown: how many of the strongest edges are drawn at first."""
        from analyses.views import flow_view

        place: Callable[[pd.Series], pd.Series] = lambda column: column.clip(lower=0)  # noqa: E731  # summed positions stand in one column
        edges = self.edges.assign(position=place(self.edges["position"]), source_position=place(self.edges["source_position"]))
        nodes = self.nodes.assign(position=place(self.nodes["position"]), details=[self._details(row) for row in self.nodes.itertuples()])
        nodes["kind"] = nodes["component"].map({"group": "head"})
        tokens = list(self.tokens) if self.by_position else ["(all)"]
        return flow_view(
            nodes,
            edges,
            tokens,
            target=self.info.get("target", "target"),
            target_value=self.value,
            shown=shown,
            paths=self._listed_paths(),
            info=self.info,
        )

    def _listed_paths(self) -> pd.DataFrame | None:
        """The strongest paths for the view; None where there are none (a grouped graph, a difference without a path)."""
        try:
            return self.paths(10)
        except RelevanceError:
            return None

    def _details(self, row: Any) -> Any:
        if row.component == "mlp":
            inside = self.neurons[(self.neurons["node"] == row.node) & (self.neurons["position"] == row.position)]
            return {"neurons": inside[["neuron", "score"]]} if len(inside) else None
        stays = self.sinks[(self.sinks["node"] == row.node) & (self.sinks["position"] == row.position)]
        stays = stays[stays["score"].abs() > 1e-4 * abs(row.score)]  # less is rounding
        return {"stays": stays[["sink", "score"]]} if len(stays) else None


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


def _ends(edges: pd.DataFrame, name: str, position: str) -> pd.DataFrame:
    return edges[[name, position]].drop_duplicates().set_axis(["node", "position"], axis=1)


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    keys = [c for c in frame.columns if c not in ("score", "token")]
    return frame.sort_values(keys).reset_index(drop=True)
