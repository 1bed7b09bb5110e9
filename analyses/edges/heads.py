"""Inside the heads of one layer: coefficients of q, k and v for each query head, and relevance from token to token.

Attention is linear in q, k and v once its rules are attached: z[t] = sum_s A[t, s] v[s] and score[t, s] = q[t] k[s], with A and the other
factor fixed by the rule (half of it, the mean of two runs, ...). So the coefficient that query head h alone gives the keys is
sum_t S_h[t, s] q_h[t] and the values sum_t A_h[t, s] g_z[t, h]; over a group of query heads (GQA) they add up to the HookPoint's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.edges.transport import pull
from analyses.edges.wiring import Layer, Wiring
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError
from lens_relevance.rules import ElementwiseRule, ProductRule, Rule, Scores, by_head, cap_slope
from lens_relevance.rules.base import difference, working
from lens_relevance.ruleset_tables import Table, rule_for
from lens_relevance.sites import Site

Heads = Float[Tensor, "batch pos head d_head"]
Grid = Float[Tensor, "batch head query key"]
Constants = dict[str, Tensor]


@dataclass(frozen=True)
class HeadCoefficients:
    """Coefficients at q, k and v (before rotation and q_norm) per query head, and relevance carried by each within the head.

    Attributes:
        q, k, v: coefficients.
        from_q: relevance that each query carries, [batch, head, query]; like what follows, None unless flows were asked for.
        from_k, from_v: relevance carried from source token (key) to destination (query), [batch, head, query, key].
        softmax, product: relevance that stays at those steps, [batch, head, query].
    """

    q: Heads
    k: Heads
    v: Heads
    from_q: Tensor | None = None
    from_k: Grid | None = None
    from_v: Grid | None = None
    softmax: Tensor | None = None
    product: Tensor | None = None


def head_coefficients(layer: Layer, cache: RelevanceCache, table: Table, *, constants: Constants, flows: bool) -> HeadCoefficients:
    """The coefficients of one layer's heads, from those of a backward pass under `table`.

    Args:
        constants: tensors at hook_cos and hook_sin (see `rotary_constants`).
        flows: also what passes from token to token.
    """
    q, k, v = (working(_coefficient(cache, site.output_name)) for site in (layer.q, layer.k, layer.v))
    group = layer.geometry.group
    if group == 1 and not flows:
        return HeadCoefficients(q, k, v)
    a = _Attention(layer, cache, table, constants)
    to_z, mix = a.to_z, a.pattern
    if group > 1:
        wide_v = torch.einsum("bhts,bthd->bshd", mix, to_z)
        wide_k = a.before_rotation(torch.einsum("bhts,bhtd->bhsd", a.products, a.queries))
        for name, wide, narrow in (("v", wide_v, v), ("k", wide_k, k)):
            _check_group(layer, name, wide, narrow)
        k, v = wide_k, wide_v
    if not flows:
        return HeadCoefficients(q, k, v)
    change_v = layer.geometry.expand(a.change(layer.v.output_name).transpose(1, 2))  # [batch, head, pos, d_head]
    change_q, change_k = a.changes
    from_v = mix * torch.einsum("bthd,bhsd->bhts", to_z, change_v)
    from_k = a.products * torch.einsum("bhtd,bhsd->bhts", a.queries, change_k)
    from_q = torch.einsum("bhts,bhsd,bhtd->bht", a.products, a.keys, change_q)
    at_pattern, at_scores = a.at_pattern.sum(-1), a.at_scores.sum(-1)
    product = cache[layer.z.output_name].sum(-1).transpose(1, 2) - at_pattern - from_v.sum(-1)
    product = product + at_scores - from_q - from_k.sum(-1)
    return HeadCoefficients(q, k, v, from_q, from_k, from_v, softmax=at_pattern - at_scores, product=product)


class _Attention:
    """Scores, pattern and z of one layer as the rules see them."""

    def __init__(self, layer: Layer, cache: RelevanceCache, table: Table, constants: Constants) -> None:
        self.layer, self.cache, self.table = layer, cache, table
        self.to_z = working(_coefficient(cache, layer.z.output_name))
        self.to_pattern = working(_coefficient(cache, layer.pattern.output_name))
        site, operation = layer.scores, layer.scores.operation
        assert isinstance(operation, Scores)
        n, component = operation.n_relevant, layer.component
        self.constants = tuple(constants[str(p.name)] for p in site.inputs[n:])
        self.turn = tuple(constants[x] for x in (_name(component, "hook_cos"), _name(component, "hook_sin")) if x in constants)
        paired = bool(cache.reference_activations)
        inputs = (*(self._raw(str(p.name), False) for p in site.inputs[:n]), *self.constants)
        other = (*(self._raw(str(p.name), True) for p in site.inputs[:n]), *self.constants) if paired else None
        product, cap = _by_head(rule_for(table, site), site)
        operands, others = operation.operands(inputs), None if other is None else operation.operands(other)
        keys, self.queries = product.factors_at(*operands, others)  # what stands for each factor in the other's coefficient
        self.keys = operation.geometry.expand(keys)
        self.products = working(_coefficient(cache, site.output_name)) * operation.geometry.scale
        if operation.geometry.soft_cap is not None:
            self.products = self.products * cap_slope(operation, cap, inputs, reference=other)
        q, k = operands if others is None else (a - b for a, b in zip(operands, others, strict=True))
        self.changes = q, operation.geometry.expand(k)
        self.pattern = self._mixing()
        self.at_pattern, self.at_scores = cache[layer.pattern.output_name], cache[site.output_name]
        if rule_for(table, layer.pattern).holds_output:  # a constant pattern receives nothing
            self.at_pattern, self.at_scores = torch.zeros_like(self.at_pattern), torch.zeros_like(self.at_scores)

    def change(self, name: str) -> Tensor:
        """Activation, less that of the reference run."""
        return difference(self.cache.activations[name], self.cache.reference_activations.get(name))

    def _mixing(self) -> Grid:
        """What stands for the pattern by which values are mixed."""
        layer, cache = self.layer, self.cache
        names = layer.pattern.output_name, layer.v.output_name

        def operands(activations: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            pattern, v = (working(activations[name]) for name in names)
            return pattern, v.transpose(1, 2)

        other = operands(cache.reference_activations) if cache.reference_activations else None
        return _by_head(rule_for(self.table, layer.z), layer.z)[0].factors_at(*operands(cache.activations), other)[1]

    def _raw(self, name: str, reference: bool) -> Tensor:
        """A q or k in the layout of the operation: [batch, head, pos, d_head] where that is what the HookPoint holds, else heads merged."""
        x = (self.cache.reference_activations if reference else self.cache.activations)[name]
        return x.transpose(1, 2) if self.layer.geometry.queries_are_split else x.flatten(2)

    def before_rotation(self, to_k: Tensor) -> Heads:
        """Coefficients at k.hook_out per query head from those at the rotated keys [batch, head, pos, d_head]."""
        layer, geometry = self.layer, self.layer.geometry
        if geometry.rotate is not None:
            to_k = geometry.rotate(to_k, -1, self.constants)
        elif self.turn:
            to_k = _turn_back(to_k, *self.turn)
        if layer.k_norm is not None:
            name = str(layer.k_norm.inputs[0].name)
            x, other = self.cache.activations[name], self.cache.reference_activations.get(name)
            members = to_k.unflatten(1, (-1, geometry.group)).movedim(2, 0)  # the n-th query heads of all groups pass the norm together
            flat = x.ndim == 3
            upstream = members.transpose(2, 3).flatten(3) if flat else members
            members = pull(layer.k_norm, rule_for(self.table, layer.k_norm), x, reference=other, upstream=upstream)
            members = members.unflatten(-1, (-1, geometry.d_head)).transpose(2, 3) if flat else members
            to_k = members.movedim(0, 2).flatten(1, 2)
        return to_k.transpose(1, 2)


def _by_head(rule: Rule, site: Site) -> tuple[ProductRule, ElementwiseRule]:
    """A rule of scores or z as the rules of its product and of a soft-cap."""
    steps = by_head(rule)
    if steps is None:
        raise CoverageError(f"edges look inside heads, for which {site.name} needs a ProductRule (a rule with `factors`); it has {rule!r}")
    return steps


def _check_group(layer: Layer, name: str, wide: Heads, narrow: Float[Tensor, "batch pos kv_head d_head"]) -> None:
    """Query heads of a group must add up to what the HookPoint of their key-value head has."""
    total = wide.unflatten(2, (-1, layer.geometry.group)).sum(3)
    scale = max(float(narrow.abs().max()), float(wide.abs().max()), 1e-30)
    worst = float((total - narrow).abs().max()) / scale
    if worst > 1e-2:
        raise CoverageError(
            f"{layer.path}.attn: the coefficients of {name} per query head do not add up to the HookPoint's ({worst:.1e} off), so this "
            "model rotates or mixes its heads in a way that edges do not know yet"
        )


def _turn_back(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of Llama's rotation, for [batch, head, pos, d_head] and cos, sin [batch, pos, rotary]."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    if not torch.equal(*cos.chunk(2, -1)):  # GPT-OSS keeps the angles of one half, which are those of the other
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = (turned * sin).chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([second, -first], -1), rest], -1)


def _coefficient(cache: RelevanceCache, name: str) -> Tensor:
    return cache.coefficients[cache.canonical(name)]


def _name(component: Any, attribute: str) -> str:
    point = getattr(component, attribute, None)
    return "" if point is None else str(point.name)


@contextmanager
def rotary_constants(wiring: Wiring) -> Iterator[Constants]:
    """Collects, while forwards run, what hook_cos and hook_sin hold: they are constants, so no cache has them.

    Sites that need call arguments (masks, positions) of their module are handed those as well.
    """
    constants: Constants = {}
    handles = []
    for layer in wiring.layers:
        for attribute in ("hook_cos", "hook_sin"):
            point = getattr(layer.component, attribute, None)
            if point is not None:
                handles.append(point.register_forward_hook(lambda m, _, out: constants.__setitem__(str(m.name), out.detach())))
        site = layer.scores
        if site.caller is not None and site.on_call is not None:
            tell = site.on_call
            handles.append(site.caller.register_forward_pre_hook(lambda _, a, k, tell=tell: tell(a, k), with_kwargs=True))
    try:
        yield constants
    finally:
        for handle in handles:
            handle.remove()
