"""Information flow routes (Ferrando and Voita 2024, arXiv 2403.00824): a graph of contributions, followed from the logits down.

Nodes are the states of the residual stream at each token (`L3.resid` enters a block, `L3.resid_mid` is between attention and MLP,
`L17.resid_post` leaves the last block), heads and MLPs, embeddings and the bias. The contributions to one state add up to 1 (see
analyses/edges/updates.py). An edge from a state to a head is what this head brings from that token; the edge from the head on is their sum.
A state to which no part is near has no edges that enter it, and is left out with what would flow through it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import LOGITS
from analyses.datasets.batches import strings_of
from analyses.edges.updates import Update, state, update_points, updates
from analyses.edges.wiring import wiring
from analyses.graph.flow import FlowGraph
from analyses.graph.network import Network
from analyses.graph.tables import EDGE_KEYS, nodes_frame
from lens_relevance.engine import propagate
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.rules.base import working


def contribution_graph(model: TransformerBridge, tokens: Int[Tensor, "1 pos"], mask: Tensor, *, target: Any, threshold: float) -> FlowGraph:
    """The routes of one prompt, from the positions that the target reads down.

    Args:
        threshold: contributions below it are left out. What is left leads from embeddings or biases to the logits.

    Returns:
        Edges are contributions to one state. The score of a node is the part of the logits' states that flows through it: the products of
        contributions along all routes to it, added up.

    Raises:
        RelevanceError: the threshold leaves no route.
        CoverageError: a model whose residual stream is not the sum of what is known to be written.
    """
    streams = wiring(model)
    if all(site.name != "unembed" for site in streams.body.sites):
        raise CoverageError("routes end at the logits of tokens (unembed), and this model has none: it gives classes or a hidden state")
    wanted = {streams.body.canonical(name) for name in update_points(streams)}
    cache = propagate(model, tokens, target, rules="gradient", names_filter=lambda name: name in wanted, attention_mask=mask)
    if missing := sorted(wanted - set(cache.activations)):
        raise CoverageError(f"contributions need {missing[0]}, but {cache.absent.get(missing[0], 'it was not kept')}")
    read = (working(cache.coefficients[streams.final])[0] != 0).any(-1)
    if not bool(read.any()):
        raise RelevanceError("the target reads no position of this prompt: its gradient at the last state of the stream is 0 everywhere")
    routes = _Routes(threshold, state(streams, len(streams.layers)), read)
    with torch.no_grad():
        for update in updates(streams, cache):
            routes.add(update)
    info = {key: str(text) for key, text in cache.info.items()}
    info |= {"kind": "contribution", "ruleset": "contributions", "threshold": f"{threshold:g}"}
    edges = routes.edges()
    graph = FlowGraph(
        edges=edges.sort_values("score", ascending=False, kind="stable", ignore_index=True),
        nodes=nodes_frame(routes.nodes(), strings_of(model, tokens[0].tolist())),
        sinks=pd.DataFrame({"node": [], "position": [], "sink": [], "score": []}),
        neurons=pd.DataFrame({"node": [], "position": [], "neuron": [], "score": []}),
        tokens=tuple(strings_of(model, tokens[0].tolist())),
        value=float(cache.value[0]),
        info=info,
    )
    kept = Network(graph).trim(np.ones(len(edges), dtype=bool))
    if not kept.any():
        raise RelevanceError(f"threshold {threshold:g} leaves no route from an input to the logits; take a smaller one")
    return graph.with_edges(graph.edges[kept])


class _Routes:
    """Edges found so far, and by node how much of the logits' states flows through it at each position."""

    def __init__(self, threshold: float, last: str, read: Tensor) -> None:
        self.threshold = threshold
        self._flow: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros(len(read), dtype=torch.float64))
        self._edges: list[pd.DataFrame] = []
        positions = read.cpu().nonzero().squeeze(1)
        shares = torch.full((len(positions),), 1.0 / len(positions), dtype=torch.float64)
        self._flow[LOGITS][positions] = shares
        self._add_edges(last, LOGITS, positions, positions, shares, shares)

    def add(self, update: Update) -> None:
        """Follow what reaches the sum of an update into its parts."""
        reaching = self._flow[update.into]
        positions = reaching.nonzero().squeeze(1)
        if not len(positions):
            return
        own, heads = (x.double().cpu() for x in update.contributions(positions.to(update.total.device)))
        for name, scores in zip(update.parts, own.T, strict=True):
            (n,) = self._large(scores)
            at, flow = positions[n], scores[n] * reaching[positions[n]]
            self._add_edges(name, update.into, at, at, scores[n], flow)
            if name in update.reads:
                self._add_edges(update.reads[name], name, at, at, scores[n], flow)
        if update.brought is None:
            return
        for name, scores in zip(update.brought.names, heads.unbind(1), strict=True):
            n, source = self._large(scores)
            at, score = positions[n], scores[n, source]
            self._add_edges(update.brought.source, name, source, at, score, score * reaching[at])
            summed = torch.zeros(len(positions), dtype=torch.float64).index_add_(0, n, score)
            (m,) = summed.nonzero(as_tuple=True)
            self._add_edges(name, update.into, positions[m], positions[m], summed[m], summed[m] * reaching[positions[m]])

    def edges(self) -> pd.DataFrame:
        """All edges found."""
        return pd.concat(self._edges, ignore_index=True)[[*EDGE_KEYS, "score"]]

    def nodes(self) -> pd.DataFrame:
        """Columns node, position, score, of what anything flows through."""
        frames = []
        for name, flow in self._flow.items():
            at = flow.nonzero().squeeze(1)
            frames.append(pd.DataFrame({"node": name, "position": at.numpy(), "score": flow[at].numpy()}))
        return pd.concat(frames, ignore_index=True)

    def _large(self, scores: Tensor) -> tuple[Tensor, ...]:
        """Where contributions are large enough."""
        return ((scores >= self.threshold) & (scores > 0)).nonzero(as_tuple=True)

    def _add_edges(
        self, source: str, target: str, sources: Tensor, targets: Tensor, score: Float[Tensor, " edge"], flow: Float[Tensor, " edge"]
    ) -> None:
        """Edges with these scores, through which this much flows."""
        if len(score):
            self._flow[source].index_add_(0, sources, flow)
            columns = dict(source=source, target=target, position=targets.numpy(), source_position=sources.numpy(), score=score.numpy())
            self._edges.append(pd.DataFrame(columns))
