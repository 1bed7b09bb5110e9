"""Attention flow (Abnar & Zuidema 2020, arXiv 2005.00928): how much attention can flow from a token down to each input at most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from torch import Tensor

from lens_relevance.attention_methods import rollout
from lens_relevance.attention_methods.accumulation import Accumulation
from lens_relevance.attention_methods.run import AttentionRun
from lens_relevance.errors import RelevanceError

TOLERANCE = 1e-9
_UNITS = 2**29  # scipy's flows are int32, and a residual edge may hold twice its capacity


def accumulate(run: AttentionRun) -> Accumulation:
    """Max-flow from the explained token at the top to every input token; capacities are rollout's A^ = (A + I) / row sum.

    Exact to 1e-9. `.matrix` computes the flow from every token (a max-flow for each pair), only when it is asked for.
    """
    return Flow(torch.stack([step.matrix() for step in rollout.steps(run)], 1), run.start, run.mask)


@dataclass(frozen=True)
class Flow(Accumulation):
    """capacities: one matrix per layer, lowest first."""

    capacities: Float[Tensor, "batch layer token source"]
    start: Float[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]

    def scores(self) -> Float[Tensor, "batch source"]:
        return self._flows(self.start).sum(1)

    def matrix(self) -> Float[Tensor, "batch token source"]:
        return self._flows(self.mask.to(self.start.dtype))

    def layers(self) -> Float[Tensor, "batch layer token source"]:
        return self.capacities * (self.mask[:, None, :, None] & self.mask[:, None, None, :])

    def heads(self) -> Float[Tensor, "batch layer head"]:
        raise RelevanceError(
            "attention_flow has no per-head parts: a maximal flow is not unique, so neither is a head's share of it; use rollout or a "
            "method that accumulates"
        )

    def _flows(self, rows: Float[Tensor, "batch token"]) -> Float[Tensor, "batch token source"]:
        """Flows from each token with a weight in `rows`, times that weight."""
        result = torch.zeros_like(self.capacities[:, 0])
        capacities = self.capacities.double().cpu().numpy()
        for example, token in rows.nonzero().tolist():
            real = self.mask[example].cpu().numpy()
            flows = flows_from(capacities[example][:, real][:, :, real], int(real[:token].sum()))
            result[example, token, self.mask[example]] = torch.from_numpy(flows).to(result) * rows[example, token]
        return result


def flows_from(capacities: np.ndarray, token: int) -> np.ndarray:
    """Max-flow from one token above the last layer to every input, for capacities [layer, token, source]."""
    n_layers, n = capacities.shape[:2]
    layer, upper, lower = capacities.nonzero()
    edges = (capacities[layer, upper, lower], ((layer + 1) * n + upper, layer * n + lower))
    graph = coo_array(edges, shape=((n_layers + 1) * n,) * 2).tocsr()
    reached = np.sort(breadth_first_order(graph, n_layers * n + token, return_predecessors=False))
    graph = graph[reached][:, reached]  # a causal model's early tokens reach little of it
    at = {int(node): i for i, node in enumerate(reached)}
    source = at[n_layers * n + token]
    return np.array([max_flow(graph, source, at[sink]) if sink in at else 0.0 for sink in range(n)])


def max_flow(capacity: csr_array, source: int, sink: int) -> float:
    """Max-flow of a graph with real capacities, to TOLERANCE.

    scipy counts in whole units: capacities are rounded down to units, and what rounding left is solved again in smaller units until the
    minimal cut bounds the rest. The value is never more than the true one and at most TOLERANCE less.
    """
    value, residual = 0.0, capacity.astype(np.float64)
    rest = min(residual[[source]].sum(), residual[:, [sink]].sum())
    while rest > TOLERANCE:
        unit = rest / _UNITS
        whole = residual.copy()
        whole.data = np.floor(np.minimum(whole.data, rest) / unit).astype(np.int32)
        found = maximum_flow(whole, source, sink)
        value += float(found.flow_value) * unit
        residual = csr_array(residual - found.flow * unit)
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        left = csr_array(whole - found.flow)
        left.eliminate_zeros()
        inside = np.zeros(capacity.shape[0], dtype=bool)
        inside[breadth_first_order(left, source, return_predecessors=False)] = True
        bound = float(residual[inside][:, ~inside].sum())
        if bound >= rest:
            break
        rest = bound
    return value
