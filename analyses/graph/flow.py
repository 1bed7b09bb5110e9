"""FlowGraph: relevance flowing through a model, as tables of nodes and edges with the questions one asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import networkx as nx
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analyses.graph import aggregate, annotate, exchange, neuronpedia, neuronpedia_reading, paths, prune, tables
from analyses.graph.tables import EVERYWHERE, FlowTables
from lens_relevance.dictionaries import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.prompt import Inputs
from lens_relevance.notebook_form import table_html


@dataclass(frozen=True, eq=False)
class FlowGraph(FlowTables):
    """A graph of signed relevance, with the questions one asks of it. Its tables are described in `FlowTables`."""

    def __repr__(self) -> str:
        return f"FlowGraph({len(self.edges)} edges, {len(self.nodes)} nodes, {self.info.get('ruleset', '')}, {self.info.get('target', '')})"

    def _repr_html_(self) -> str:
        listed = self._listed_paths()
        rows = [] if listed is None else [{"strongest paths": row.path, "share": f"{row.share:.1%}"} for row in listed.head(5).itertuples()]
        table = table_html(rows) if rows else ""
        return f"<div><code>{escape(repr(self))}</code></div>{table}<div><code>.show()</code> draws it</div>"

    # ---- choosing

    def above(self, threshold: float) -> FlowGraph:
        """Edges with |score| of at least `threshold`.

        Raises:
            RelevanceError: there are none.
        """
        kept = self.edges[self.edges["score"].abs() >= threshold]
        if kept.empty:
            strongest = float(self.edges["score"].abs().max()) if len(self.edges) else 0.0
            raise RelevanceError(f"threshold {threshold:g} removes every edge; the strongest has |score| {strongest:.3g}")
        return self.with_edges(kept)

    def prune(self, keep: float | None = None, top: int | None = None, min_share: float | None = None) -> FlowGraph:
        """A connected subgraph, grown from the target downwards; every edge left lies on a path from an input to the target.

        Args:
            keep: for each node the strongest edges that enter it, until they carry this share of the |relevance| entering.
            top: the strongest edges one by one, each into a node that is there already (at most this many: dead ends are taken off).
            min_share: edges with at least this share of the |relevance| that enters the target.

        Exactly one of the three is given.

        Raises:
            RelevanceError: an empty graph, a target that nothing enters, or nothing would be left.
        """
        return self.with_edges(self.edges[prune.mask(self, keep, top, min_share=min_share)])

    def with_edges(self, edges: pd.DataFrame) -> FlowGraph:
        """The graph of some of its edges and the nodes at their ends. Scores of nodes stay those of the whole graph."""
        return tables.with_edges(self, edges)

    def annotated(self, model: TransformerBridge, inputs: Inputs, *, dictionaries: Sequence[Dictionary] = ()) -> FlowGraph:
        """The graph with what its heads, MLPs and listed neurons write, and where its heads look, for the panel of a node and for files.

        Args:
            model, inputs: those that the graph is of. Prune first: each unit is described.
            dictionaries: those that the graph is of, for what its features write, whatever the run.

        Raises:
            RelevanceError: another prompt, or a graph whose positions are summed over.
            CoverageError: a model whose output head is not linear (see `analyses.describe.written_tokens`).
        """
        return annotate.annotated(self, model, inputs, dictionaries)

    # ---- asking

    def paths(self, n: int = 10) -> pd.DataFrame:
        """The n strongest paths from an input to the target.

        Returns:
            Columns path; share (of all relevance by its absolute value, the part that takes this path, if each node passes on what enters
            it in proportion to |score|; over all paths shares add up to 1); weakest (the signed score of the path's weakest edge).
        """
        return paths.strongest(self, n)

    def bottlenecks(self, n: int = 10) -> pd.DataFrame:
        """Nodes through which most flows. Prune first: with millions of edges this takes minutes.

        Returns:
            Columns node; position; through (share of all paths, weighted as in `paths`, that pass the node); dominates (how many nodes
            reach the target only through it, by the dominator tree from the target).
        """
        return paths.bottlenecks(self, n)

    def open(self, node: str, position: int | None = None) -> pd.DataFrame:
        """What is inside a node: the strongest neurons of an MLP; for a head the edges from its q, k, v and source tokens.

        Of a node without an inside (a reader, a mixture of experts) the edges that enter it.

        Raises:
            RelevanceError: there is no such node.
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
        """Same tokens, value, nodes, edges, sinks, neurons and features, exactly, in whatever order."""
        if not isinstance(other, FlowGraph):
            return NotImplemented
        if self.tokens != other.tokens or self.value != other.value:
            return False
        return all(
            _ordered(getattr(self, n)).equals(_ordered(getattr(other, n))) for n in ("edges", "nodes", "sinks", "neurons", "features")
        )

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

    def to_neuronpedia(
        self, path: str | Path | None = None, *, slug: str, scan: str | None = None, token_prob: float | None = None
    ) -> dict[str, Any]:
        """The graph in Neuronpedia's and circuit-tracer's format, also written to `path`; `from_neuronpedia` gives back an equal one.

        Heads have `qk_tracing_results` from their query and key edges. Annotate the graph first for labels. Prune before: the web page is
        made for hundreds of nodes.

        Args:
            slug: the graph's name in addresses.
            scan: Neuronpedia's name of the model (`gemma-3-270m`); by default the name that the model has here.
            token_prob: the probability of the answer, shown at the logits.

        Raises:
            RelevanceError: positions are summed over, or nodes are grouped.
        """
        return neuronpedia.to_neuronpedia(self, path, slug=slug, scan=scan, token_prob=token_prob)

    @classmethod
    def from_neuronpedia(cls, path: str | Path, *, scan: str | None = None) -> FlowGraph:
        """Read an attribution graph that Neuronpedia, circuit-tracer or `to_neuronpedia` wrote.

        Of another tool's graph, nodes have a score of 0 (the format knows none), features are named `L3F253`, and labels are its `clerp`s.

        Args:
            scan: the model that it has to be of; None for any.

        Raises:
            RelevanceError: no such graph: malformed, unknown fields, links to nodes that are not there, of another model.
        """
        return neuronpedia_reading.from_neuronpedia(cls, path, scan)

    def show(self, shown: int = 100) -> Any:
        """The flow view: tokens along x, layers up y.

        Args:
            shown: how many of the strongest edges are drawn at first.
        """
        from analyses.views import flow_view

        place: Callable[[pd.Series], pd.Series] = lambda column: column.clip(lower=0)  # noqa: E731  # summed positions stand in one column
        edges = self.edges.assign(position=place(self.edges["position"]), source_position=place(self.edges["source_position"]))
        nodes = self.nodes.assign(position=place(self.nodes["position"]), details=[self._details(row) for row in self.nodes.itertuples()])
        nodes["kind"] = nodes["component"].map({"group": "head"})
        intervals = self.intervals.assign(position=place(self.intervals["position"]))
        nodes = nodes.merge(intervals, on=["node", "position"], how="left") if len(intervals) else nodes
        tokens = list(self.tokens) if self.by_position else ["(all)"]
        return flow_view(
            nodes,
            edges,
            tokens,
            target="what the logits read" if self.of_contributions else self.info.get("target", "target"),
            target_value=None if self.of_contributions else self.value,
            shown=shown,
            title="Flow of contributions" if self.of_contributions else "Relevance flow",
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
        """What the panel of a node shows beside its edges."""
        here = lambda table: table[(table["node"] == row.node) & (table["position"] == row.position)]  # noqa: E731
        shown: dict[str, Any] = {}
        if label := self.labels.get(f"{row.node}@{row.position}"):
            shown["writes"] = label
        if len(value := here(self.features)):
            shown["activation"] = float(value["activation"].iloc[0])
        if row.component == "mlp" and len(inside := here(self.neurons)):
            layer = row.node.removesuffix(".mlp")
            writes = [self.labels.get(f"{layer}N{neuron}@{row.position}", "") for neuron in inside["neuron"]]
            shown["neurons"] = inside[["neuron", "score"]].assign(**{"writes": writes} if any(writes) else {})
        stays = here(self.sinks)
        stays = stays[stays["score"].abs() > 1e-4 * abs(row.score)]  # less is rounding
        if row.component != "mlp" and len(stays):
            shown["stays"] = stays[["sink", "score"]]
        if len(looks := here(self.attention)):
            tokens = [f"{self.token(source)} ({source})" for source in looks["source_position"]]
            shown["looks at"] = pd.DataFrame({"token": tokens, "attention": looks["attention"].to_numpy()})
        if (row.component in ("heads", "mlp") or len(value)) and row.position != EVERYWHERE:
            further = ", dictionaries=dictionaries" if len(value) else ""
            shown["without it, in Python"] = f'with set_units(model, {{"{row.node}@{row.position}": 0.0}}{further}): model(prompt)'
        return shown or None


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:  # whose columns have whatever type
        return pd.DataFrame(columns=[*frame.columns])
    keys = [c for c in frame.columns if c not in ("score", "token")]
    return frame.sort_values(keys).reset_index(drop=True)
