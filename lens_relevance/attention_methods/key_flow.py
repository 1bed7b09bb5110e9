"""Relevance that reaches a head's keys, query by query: the key path of `head_flow`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.rules import AttentionGeometry, Scores, by_head, cap_slope
from lens_relevance.rules.base import share, working
from lens_relevance.ruleset_tables import Table, rule_for, ruleset
from lens_relevance.sites import Anatomy, Site


def scores_site(body: Anatomy, layer: int) -> Site:
    """Where a layer's scores are made."""
    return next(s for s in body.sites if s.layer == layer and isinstance(s.operation, Scores))


def key_points(body: Anatomy, layers: Sequence[int]) -> list[str]:
    """HookPoints the key path needs: queries, keys and the scores."""
    sites = [scores_site(body, layer) for layer in layers]
    return [str(point.name) for site in sites for point in (*site.inputs[:2], site.output) if point is not None]


@contextmanager
def rotary_constants(model: HookedModel, body: Anatomy, layers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """cos and sin of the forwards that run inside, by HookPoint name: they are not part of the graph, so no cache has them."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x.detach()

    names = [str(point.name) for layer in layers for point in scores_site(body, layer).inputs[2:]]
    hooks: Any = getattr(model, "hooks")  # noqa: B009 - a bridge and a HookedRootModule have it
    with hooks(fwd_hooks=[(name, keep) for name in names]):
        yield kept


def key_flow(
    body: Anatomy, cache: RelevanceCache, constants: dict[str, Tensor], *, layer: int, rules: str | Table
) -> Float[Tensor, "batch head query key"]:
    """(k[s] - k'[s]) . scale * q[t] * (coefficient at the raw score of t and s); k' = 0 where there is no reference.

    q is what the rule of the product has in its place: the mean of both runs under pair rules, half of it under the uniform rule.
    """
    site = scores_site(body, layer)
    scores, rule = site.operation, rule_for(ruleset(rules), site)
    assert isinstance(scores, Scores)
    geometry, steps = scores.geometry, by_head(rule)
    if steps is None:
        raise RelevanceError(f"the key path needs a ProductRule (a rule with `factors`) for the scores, and {site.name} has {rule!r}")

    def inputs(activations: dict[str, Tensor]) -> tuple[Tensor, ...]:
        raw = (_raw(body, geometry, str(point.name), activations) for point in site.inputs[:2])
        return (*raw, *(constants[str(point.name)] for point in site.inputs[2:]))

    own = inputs(cache.activations)
    other = inputs(cache.reference_activations) if cache.reference_activations else None
    name = str(site.output.name) if site.output is not None else ""
    upstream = cache.coefficients[name]
    if geometry.soft_cap is not None:
        upstream = working(upstream) * cap_slope(scores, steps[1], own, reference=other)
    queries = steps[0].factors_at(*scores.operands(own), None if other is None else scores.operands(other))[1]
    keys = scores.operands(own)[1]
    if other is not None:
        keys = keys - scores.operands(other)[1]
    real = cache.mask.bool()
    keys = torch.where(real[:, None, :, None], keys, torch.zeros_like(keys))
    products = queries @ geometry.expand(keys).mT * geometry.scale
    return share(torch.where(real[:, None, :, None], products, torch.zeros_like(products)), upstream)


def _raw(body: Anatomy, geometry: AttentionGeometry, name: str, activations: dict[str, Tensor]) -> Tensor:
    """Queries or keys as the operation takes them, from TransformerLens's layout."""
    x = activations[name]
    if not geometry.queries_are_split:
        return x.flatten(-2)
    return x if body.conversion(name) is None else x.transpose(1, 2)
