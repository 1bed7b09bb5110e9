"""Which edges a pruned graph keeps: grown from the target downwards, then freed of dead ends."""

from __future__ import annotations

import heapq

import numpy as np
from jaxtyping import Bool

from analyses.graph.network import Network
from analyses.graph.tables import FlowTables
from lens_relevance.errors import RelevanceError

Kept = Bool[np.ndarray, " edge"]


def mask(graph: FlowTables, keep: float | None, top: int | None, *, min_share: float | None) -> Kept:
    """Edges that stay; exactly one of the three criteria is given (see `FlowGraph.prune`)."""
    if sum(x is not None for x in (keep, top, min_share)) != 1:
        raise RelevanceError("prune takes one of keep=, top= and min_share=")
    network = Network(graph)
    if keep is not None:
        if not 0 < keep <= 1:
            raise RelevanceError(f"keep is a share of the relevance that enters a node, in (0, 1], got {keep}")
        kept = _nucleus(network, keep)
    elif top is not None:
        if top < 1:
            raise RelevanceError(f"top counts edges, got {top}")
        kept = _greedy(network, top)
    else:
        assert min_share is not None
        if not 0 <= min_share <= 1:
            raise RelevanceError(f"min_share is a share of the relevance that enters the target, in [0, 1], got {min_share}")
        kept = _above(network, min_share * network.entering[network.targets].sum())
    kept = network.trim(kept)
    if not kept.any():
        asked = f"keep={keep}" if keep is not None else f"top={top}" if top is not None else f"min_share={min_share}"
        raise RelevanceError(f"prune({asked}) leaves no path from an input to the target; ask for more")
    return kept


def _nucleus(network: Network, keep: float) -> Kept:
    """For each node that is reached, the fewest edges that carry the share `keep` of what enters it."""
    reached, kept = np.zeros(len(network), dtype=bool), np.zeros(len(network.size), dtype=bool)
    reached[network.targets] = True
    for edges in network.downwards():
        edges = edges[reached[network.target[edges]] & (network.size[edges] > 0)]
        edges = edges[np.lexsort((-network.share[edges], network.target[edges]))]
        share, node = network.share[edges], network.target[edges]
        before = np.cumsum(share) - share
        first = np.concatenate([[True], node[1:] != node[:-1]]) if len(edges) else np.zeros(0, dtype=bool)
        before = before - np.repeat(before[first], np.diff(np.append(np.flatnonzero(first), len(edges))))
        chosen = edges[(before < keep - 1e-12) | first]
        kept[chosen] = True
        reached[network.source[chosen]] = True
    return kept


def _above(network: Network, smallest: float) -> Kept:
    """For each node that is reached, the edges of at least this size."""
    reached, kept = np.zeros(len(network), dtype=bool), np.zeros(len(network.size), dtype=bool)
    reached[network.targets] = True
    for edges in network.downwards():
        chosen = edges[reached[network.target[edges]] & (network.size[edges] >= smallest) & (network.size[edges] > 0)]
        kept[chosen] = True
        reached[network.source[chosen]] = True
    return kept


def _greedy(network: Network, top: int) -> Kept:
    """The strongest edge into what is reached already, again and again, until `top` edges lie on paths from an input.

    Edges taken so far may end in nodes that no input reaches yet; more are taken until the trimmed graph is as large as asked for.
    """
    taken = _Growth(network)
    count = top
    while taken.grow(count) and network.trim(taken.first(count)).sum() < top:
        count *= 2
    low, high = 0, min(count, len(taken.edges))
    while low < high:  # the trimmed graph grows with the number of edges taken
        middle = (low + high + 1) // 2
        if network.trim(taken.first(middle)).sum() <= top:
            low = middle
        else:
            high = middle - 1
    return taken.first(low)


class _Growth:
    """Edges in the order in which the greedy search takes them."""

    def __init__(self, network: Network) -> None:
        self.network, self.edges = network, list[int]()
        self._order = np.argsort(network.target, kind="stable")
        self._bounds = np.searchsorted(network.target[self._order], np.arange(len(network) + 1))
        self._reached = np.zeros(len(network), dtype=bool)
        self._heap: list[tuple[float, int]] = []
        for node in network.targets:
            self._reach(int(node))

    def _reach(self, node: int) -> None:
        if not self._reached[node]:
            self._reached[node] = True
            for edge in self._order[self._bounds[node] : self._bounds[node + 1]]:
                if self.network.size[edge] > 0:
                    heapq.heappush(self._heap, (-self.network.size[edge], int(edge)))

    def grow(self, count: int) -> bool:
        """Take edges until there are `count`; whether there were that many."""
        while len(self.edges) < count and self._heap:
            edge = heapq.heappop(self._heap)[1]
            self.edges.append(edge)
            self._reach(int(self.network.source[edge]))
        return len(self.edges) == count

    def first(self, count: int) -> Kept:
        """The first edges that were taken, as a mask."""
        kept = np.zeros(len(self.network.size), dtype=bool)
        kept[self.edges[:count]] = True
        return kept
