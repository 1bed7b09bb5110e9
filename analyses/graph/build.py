"""flow_graph: from a model and a prompt to a FlowGraph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import strings_of
from analyses.edges.attribution import edges_of, passes
from analyses.edges.dictionaries import standing, strongest_features
from analyses.edges.flows import Flows, flows_of
from analyses.edges.heads import Constants
from analyses.edges.wiring import Wiring, wiring
from analyses.graph.flow import FlowGraph
from analyses.graph.intervals import node_intervals
from analyses.graph.routes import contribution_graph
from analyses.graph.tables import no_features, nodes_frame
from analyses.tasks import PromptPairs
from lens_relevance.cache import RelevanceCache
from lens_relevance.defaults import with_defaults
from lens_relevance.dictionaries import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, Prompt, tokenize
from lens_relevance.inputs.references import is_inputs, reference_run
from lens_relevance.inputs.targets import AnyTarget, as_target
from lens_relevance.ruleset_tables import Table, ruleset

NEURONS_KEPT = 10
Run = tuple[RelevanceCache, Constants]


@left_as_found
def flow_graph(
    model: TransformerBridge,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    kind: str = "relevance",
    rules: str | Table | None = None,
    reference: Any = None,
    by_position: bool = True,
    threshold: float = 0.0,
    dictionaries: Sequence[Dictionary] = (),
    n_features: int = 100,
) -> FlowGraph:
    """The graph over which relevance flows from the embeddings of one prompt to the target, exact on every edge.

    Source: ours; edges as `attribute_edges` gives them.

    Args:
        inputs: a single prompt, as for `propagate`.
        target, rules, reference: as for `propagate`.
        kind: `relevance`, or `contribution`: Information Flow Routes, by how much heads, MLPs and the residual connection make up each
            state of the stream, whatever the target makes of it (see analyses/graph/routes.py). Of the target only the position that it
            reads counts then, and rules, reference and dictionaries are refused.
        by_position: one node per component and position; otherwise edges are summed over positions.
        threshold: leave out edges with a smaller |score|, in the target's units (edges of exactly 0 are never kept); `FlowGraph.prune`
            chooses with more care. Of contributions a share between 0 and 1, and what is left leads from inputs to the logits.
        dictionaries: sparse autoencoders and transcoders, one for a layer at most. Their features are nodes (`L9F17`) beside the heads, and
            so is what they miss (`L9.error`), where relevance ends. A transcoder stands in the place of an MLP.
        n_features: features that are nodes of their own, those of the largest relevance at a position; the others of a layer are one node,
            `L9.features`, so that nothing is left out.

    Between two prompts, without dictionaries, `intervals` says for heads, MLPs and embeddings where the effect of patching them is
    expected, for 4 forward and 3 backward passes besides.

    Raises:
        RelevanceError: several prompts, scores that are not finite, a threshold that leaves no edge, two dictionaries in one layer, or an
            argument that the kind does not take.
        CoverageError: a model or a dictionary whose edges cannot be separated.
    """
    tokens, mask = tokenize(model, inputs)
    if len(tokens) != 1:
        raise RelevanceError(f"a flow graph is that of one prompt, got {len(tokens)}; flow_graphs makes one for each, average joins them")
    graph = _graph(
        model,
        tokens,
        mask,
        target,
        kind=kind,
        rules=rules,
        reference=reference,
        by_position=by_position,
        threshold=threshold,
        dictionaries=dictionaries,
        n_features=n_features,
    )
    if target is None or dictionaries or not is_inputs(reference):
        return graph
    other = reference_run(model, reference, Prompt(tokens, mask)).prompt
    pair = PromptPairs(tokens, other.tokens, target, mask, other.mask)
    return replace(graph, intervals=node_intervals(model, pair, by_position=by_position))


def _graph(
    model: TransformerBridge,
    tokens: Tensor,
    mask: Tensor,
    target: AnyTarget | None,
    *,
    kind: str,
    rules: str | Table | None,
    reference: Any,
    by_position: bool,
    threshold: float,
    dictionaries: Sequence[Dictionary],
    n_features: int,
) -> FlowGraph:
    """The graph of one prompt, without intervals."""
    if kind == "contribution":
        if rules is not None or reference is not None or len(dictionaries):
            raise RelevanceError("contributions are those of one run, without rules, a reference or dictionaries; leave these out")
        graph = contribution_graph(model, tokens, mask, target=target, threshold=threshold)
        return graph if by_position else graph.sum_positions()
    if kind != "relevance":
        raise RelevanceError(f"kind is 'relevance' or 'contribution', not {kind!r}")
    rules, reference = with_defaults(model, Prompt(tokens, mask), rules, reference=reference)
    streams, table = wiring(model), ruleset(rules)
    if dictionaries:
        streams = replace(streams, dictionaries=standing(streams, dictionaries, table))
    runs: Iterable[Run] = passes(model, streams, tokens, target=target, rules=rules, reference=reference, attention_mask=mask, flows=True)
    if dictionaries:
        runs = list(runs)
        streams = _with_chosen_features(runs, streams, n_features)
    parts = []
    for cache, constants in runs:
        edges, heads = edges_of(streams, cache, constants, table=table, flows=True)
        parts.append(flows_of(streams, cache, edges, heads=heads))
    flows = parts[0] if len(parts) == 1 else _mean(parts)
    graph = _assemble(flows, strings_of(model, tokens[0].tolist()))
    if graph.edges.empty:
        raise RelevanceError("no edge carries any relevance: the target does not depend on this prompt, or the two runs are the same")
    graph = graph if by_position else graph.sum_positions()
    return graph.above(threshold) if threshold > 0 else graph


@left_as_found
def flow_graphs(
    model: TransformerBridge,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    kind: str = "relevance",
    rules: str | Table | None = None,
    reference: Any = None,
    by_position: bool = True,
    threshold: float = 0.0,
    dictionaries: Sequence[Dictionary] = (),
    n_features: int = 100,
) -> list[FlowGraph]:
    """One graph for each of several prompts, without intervals.

    Arguments as in `flow_graph`, a reference of token ids or texts with one row per prompt.
    """
    return list(
        each_graph(
            model,
            inputs,
            target,
            kind=kind,
            rules=rules,
            reference=reference,
            by_position=by_position,
            threshold=threshold,
            dictionaries=dictionaries,
            n_features=n_features,
        )
    )


def each_graph(
    model: TransformerBridge, inputs: Inputs, target: AnyTarget | None, *, reference: Any = None, **settings: Any
) -> Iterator[FlowGraph]:
    """The graphs of `flow_graphs` one by one, so that one is in memory at a time; settings are its other arguments, all of them."""
    tokens, mask = tokenize(model, inputs)
    given = None
    if isinstance(reference, Tensor | list | tuple):
        given = tokenize(model, reference)[0]
        if len(given) != len(tokens):
            raise RelevanceError(f"{len(given)} references for {len(tokens)} prompts; give one for each")
    whole = None if target is None else as_target(target).made_for(len(tokens))
    for row in range(len(tokens)):
        real = mask[row].bool()
        one = None if whole is None else whole.select([row])
        other = reference if given is None else given[row : row + 1, real]
        yield _graph(model, tokens[row : row + 1, real], mask[row : row + 1, real], one, reference=other, **settings)


def _with_chosen_features(runs: Sequence[Run], streams: Wiring, n: int) -> Wiring:
    """The stream with the features that carry most in these runs as units of their own."""
    chosen = strongest_features(streams.dictionaries, [cache for cache, _ in runs], n)
    found = tuple(replace(one, chosen=features) for one, features in zip(streams.dictionaries, chosen, strict=True))
    return replace(streams, dictionaries=found)


def _mean(parts: Sequence[Flows]) -> Flows:
    """Scores averaged over several references."""

    def mean(name: str) -> dict[Any, Tensor]:
        columns = [getattr(part, name) for part in parts]
        return {key: torch.stack([column[key] for column in columns]).mean(0) for key in columns[0]}

    return replace(
        parts[0],
        edges=mean("edges"),
        nodes=mean("nodes"),
        sinks=mean("sinks"),
        neurons=mean("neurons"),
        activations=mean("activations"),
        value=sum(part.value for part in parts) / len(parts),
    )


def _assemble(flows: Flows, tokens: list[str]) -> FlowGraph:
    """Tables from tensors; edges and sinks of exactly 0 are left out."""
    edges: list[pd.DataFrame] = []
    for (kind, source, target), score in flows.edges.items():
        values = _finite(score, f"edges {kind}")
        index = np.nonzero(values)
        columns: dict[str, Any] = {}
        if kind == "residual":  # [pos, writer, reader]
            writers, readers = np.array(source, dtype=object), np.array(target, dtype=object)
            columns = dict(source=writers[index[1]], target=readers[index[2]], position=index[0], source_position=index[0])
        elif kind == "within":  # [name, pos]
            names, into = np.array(source, dtype=object), np.array(target, dtype=object)
            columns = dict(source=names[index[0]], target=into[index[0]], position=index[1], source_position=index[1])
        else:  # between positions: [name, destination, source]
            names, into = np.array(source, dtype=object), np.array(target, dtype=object)
            columns = dict(source=names[index[0]], target=into[index[0]], position=index[1], source_position=index[2])
        edges.append(pd.DataFrame(columns | {"score": values[index]}))
    everything = pd.concat(edges, ignore_index=True)
    order = np.argsort(-everything["score"].abs().to_numpy(), kind="stable")
    nodes = [_table(names, _finite(score, "nodes"), "node") for names, score in flows.nodes.items()]
    sinks = [_table(names, _finite(score, f"sink {kind}"), "node").assign(sink=kind) for (kind, names), score in flows.sinks.items()]
    sink_frame = pd.concat(sinks, ignore_index=True)[["node", "position", "sink", "score"]]
    return FlowGraph(
        edges=everything.iloc[order].reset_index(drop=True),
        nodes=nodes_frame(pd.concat(nodes, ignore_index=True), tokens),
        sinks=sink_frame[sink_frame["score"] != 0].reset_index(drop=True),
        neurons=_neurons(flows),
        features=_features(flows),
        tokens=tuple(tokens),
        value=flows.value,
        info=flows.info,
    )


def _table(names: tuple[str, ...], values: np.ndarray, column: str) -> pd.DataFrame:
    """[name, pos] as a long table."""
    name, position = np.indices(values.shape)
    return pd.DataFrame({column: np.array(names, dtype=object)[name.ravel()], "position": position.ravel(), "score": values.ravel()})


def _features(flows: Flows) -> pd.DataFrame:
    """The features that are nodes, at every position."""
    frames = [_table(names, _finite(x, "features"), "node") for names, x in flows.activations.items() if names]
    if not frames:
        return no_features()
    return pd.concat(frames, ignore_index=True).rename(columns={"score": "activation"})


def _neurons(flows: Flows) -> pd.DataFrame:
    """The strongest neurons of each MLP at each position."""
    frames = []
    for name, score in flows.neurons.items():
        kept = min(NEURONS_KEPT, score.shape[1])
        best = score.abs().topk(kept, dim=1).indices
        values = _finite(score.gather(1, best), f"neurons of {name}")
        position = np.repeat(np.arange(len(score)), kept)
        frames.append(pd.DataFrame({"node": name, "position": position, "neuron": best.flatten().numpy(), "score": values.ravel()}))
    if not frames:
        return pd.DataFrame({"node": [], "position": [], "neuron": [], "score": []})
    table = pd.concat(frames, ignore_index=True)
    return table[table["score"] != 0].reset_index(drop=True)


def _finite(score: Tensor, what: str) -> np.ndarray:
    values = score.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise RelevanceError(
            f"{what}: {count} of {values.size} scores are NaN or infinite; look at conservation() of propagate(..., audit=True) for "
            "the layer where it begins, or run the model in float32"
        )
    return values
