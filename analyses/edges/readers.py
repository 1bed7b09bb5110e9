"""The coefficient of each reader at the residual stream it reads, without copies of the stream.

Coefficients at q, k and v go back through each head's weights to the output of the norm, and through the norm's rule all together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.edges.heads import HeadCoefficients
from analyses.edges.transport import pull
from analyses.edges.wiring import Layer, linear
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError
from lens_relevance.rules import Rule
from lens_relevance.rules.base import working
from lens_relevance.ruleset_tables import PLAIN, Table, rule_for
from lens_relevance.sites import Site

Coefficients = Float[Tensor, "reader batch pos d_model"]


def attention_readers(layer: Layer, cache: RelevanceCache, table: Table, *, heads: HeadCoefficients) -> Coefficients:
    """Coefficients of q of every head, then k, then v, at the stream that attention reads."""
    at_norm = []
    for site, coefficient in ((layer.q, heads.q), (layer.k, heads.k), (layer.v, heads.v)):
        if not rule_for(table, site).is_plain:
            raise CoverageError(f"edges need linear layers without a rule of their own; {site.name} has {rule_for(table, site)!r}")
        weight = linear(site).weight.to(coefficient.dtype).unflatten(0, (-1, coefficient.shape[-1]))
        if weight.shape[0] != coefficient.shape[2]:  # query heads of a group share a key-value head
            weight = weight.repeat_interleave(coefficient.shape[2] // weight.shape[0], 0)
        at_norm.append((coefficient.movedim(2, 0).flatten(1, 2) @ weight).unflatten(1, coefficient.shape[:2]))
    return _through(layer.attn_norm, layer.attn_input, cache, table, torch.cat(at_norm))


def mlp_reader(layer: Layer, cache: RelevanceCache, table: Table) -> Coefficients:
    """The coefficient of the MLP at the stream that it reads."""
    coefficient = working(cache.coefficients[f"{layer.path}.mlp.hook_in"]).unsqueeze(0)
    return _through(layer.mlp_norm, layer.mlp_input, cache, table, coefficient)


def _through(norm: Site | None, point: str, cache: RelevanceCache, table: Table, coefficients: Tensor) -> Coefficients:
    rule: Rule = PLAIN if norm is None else rule_for(table, norm)
    return pull(norm, rule, cache.activations[point], reference=cache.reference_activations.get(point), upstream=coefficients)
