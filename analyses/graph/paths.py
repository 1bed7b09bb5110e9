"""Strongest paths and bottlenecks of a flow graph."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd

from analyses.graph.network import Network
from analyses.graph.tables import FlowTables
from lens_relevance.errors import RelevanceError


def strongest(graph: FlowTables, n: int) -> pd.DataFrame:
    """See `FlowGraph.paths`. Best-first search from the target; the bound is the best that any path below a node can do, so it is exact."""
    if n < 1:
        raise RelevanceError(f"paths takes how many paths are wanted, got {n}")
    network = Network(graph)
    best = network.inputs.astype(float)
    for edges in network.upwards():
        np.maximum.at(best, network.target[edges], network.share[edges] * best[network.source[edges]])
    order = np.argsort(network.target, kind="stable")
    bounds = np.searchsorted(network.target[order], np.arange(len(network) + 1))
    score = graph.edges["score"].to_numpy(dtype=float)
    tie = itertools.count()
    start = network.start()
    # An entry: minus the bound, a tie-breaker, the node, the share so far, and the edges taken as a linked list.
    heap: list[tuple[float, int, int, float, Any]] = [
        (-start[t] * best[t], next(tie), int(t), float(start[t]), None) for t in network.targets
    ]
    heapq.heapify(heap)
    rows: list[dict[str, Any]] = []
    while heap and len(rows) < n:
        bound, _, node, share, taken = heapq.heappop(heap)
        if bound == 0:
            break
        if network.inputs[node]:
            edges_up: list[int] = []
            while taken is not None:
                edge, taken = taken
                edges_up.append(edge)
            nodes = [network.source[edges_up[0]], *(network.target[e] for e in edges_up)]
            weakest = min(edges_up, key=lambda e: abs(score[e]))
            rows.append({"path": " -> ".join(_label(network.keys[i]) for i in nodes), "share": share, "weakest": score[weakest]})
            continue
        for edge in order[bounds[node] : bounds[node + 1]]:
            below, passed = int(network.source[edge]), share * network.share[edge]
            if passed * best[below] > 0:
                heapq.heappush(heap, (-passed * best[below], next(tie), below, passed, (int(edge), taken)))
    if not rows:
        raise RelevanceError("the target is disconnected: no path leads from an input to it in this graph")
    return pd.DataFrame(rows)


def bottlenecks(graph: FlowTables, n: int) -> pd.DataFrame:
    """See `FlowGraph.bottlenecks`."""
    network = Network(graph)
    through = network.through()
    digraph = nx.DiGraph()
    digraph.add_edges_from(zip(network.target.tolist(), network.source.tolist(), strict=True))
    root = -1
    digraph.add_edges_from((root, int(t)) for t in network.targets)
    parent = nx.immediate_dominators(digraph, root)
    # A node dominates its whole subtree: count from the leaves of the dominator tree up, deepest stage first.
    size: Counter[int] = Counter()
    reached = [i for i in parent if i != root]
    for node in sorted(reached, key=lambda i: network.stage[i]):
        above = parent[node]
        if above != root and above is not None:
            size[above] += 1 + size[node]
    rows = [
        {"node": network.keys[i][0], "position": network.keys[i][1], "through": through[i], "dominates": size[i]}
        for i in reached
        if not network.inputs[i] and i not in set(network.targets.tolist())
    ]
    columns = ["node", "position", "through", "dominates"]
    return pd.DataFrame(rows, columns=columns).sort_values(["dominates", "through"], ascending=False, ignore_index=True).head(n)


def _label(key: tuple[str, int]) -> str:
    name, position = key
    return name if position < 0 else f"{name}@{position}"
