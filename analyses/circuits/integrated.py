"""EAP-IG-inputs: edges with the gradient averaged between corrupt and clean embeddings (Hanna et al. 2024)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from analyses.circuits.runs import record
from analyses.edges.attribution import EdgeAttribution, edges_of, passes
from analyses.edges.wiring import wiring
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.ruleset_tables import ruleset


def integrated_edges(model: Any, pairs: PromptPairs, steps: int = 20) -> EdgeAttribution:
    """Edges (u_clean - u_corrupt) . g_v, with g_v averaged over `steps` midpoints of the line between the two runs' token embeddings.

    One forward and backward per step. Raises RelevanceError for fewer than one step.
    """
    if steps < 1:
        raise RelevanceError(f"ig_steps counts points between the two runs, got {steps}")
    found, plain = wiring(model), ruleset("gradient")
    leaf = found.body.leaves[0]
    clean = record(model, pairs.clean, pairs.clean_mask, [leaf])[leaf]
    corrupt = record(model, pairs.corrupt, pairs.corrupt_mask, [leaf])[leaf]
    ((values, _),) = passes(model, found, pairs.clean, pairs.target, "gradient", pairs.corrupt, pairs.clean_mask)
    total: EdgeAttribution | None = None
    for step in range(steps):
        shift = (step + 0.5) / steps * (clean - corrupt)

        def move(x: Tensor, hook: Any, shift: Tensor = shift) -> Tensor:
            return x + shift  # on the graph of x, at which the backward ends

        with model.hooks(fwd_hooks=[(leaf, move)]):
            ((cache, constants),) = passes(model, found, pairs.corrupt, pairs.target, "gradient", None, pairs.clean_mask)
        edges = edges_of(found, cache, constants, plain, values=values)[0]
        total = edges if total is None else _add(total, edges)
    assert total is not None
    return _scaled(total, 1 / steps)


_SCORES = ("scores", "writer_scores", "reader_scores")


def _add(first: EdgeAttribution, second: EdgeAttribution) -> EdgeAttribution:
    return replace(first, **{name: getattr(first, name) + getattr(second, name) for name in _SCORES})


def _scaled(edges: EdgeAttribution, factor: float) -> EdgeAttribution:
    return replace(edges, **{name: getattr(edges, name) * factor for name in _SCORES})
