"""The products of attention: scores = scale * q k^T (soft-capped, masked) and z = pattern v. Between them lies the softmax.

Both are products of two operands by head, so that every rule for products passes them. Scores that pass a soft-cap (Gemma 2) are a product
and an element-wise function in one operation, and their rule calls one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.rules.activation import ElementwiseRule
from lens_relevance.rules.base import Coefficients, Kept, Operation, Output, PerExample, Reference, Rule, Tensors, nothing_kept, working
from lens_relevance.rules.product import GRADIENT, Product, ProductRule, elementwise, product

Rotation = Callable[[Float[Tensor, "*lead head pos d_head"], int, Tensors], Float[Tensor, "*lead head pos d_head"]]
"""(queries or keys, 1 or -1, constant inputs) -> the same turned by their positions, or, with -1, turned back."""


class AttentionGeometry:
    """How raw tensors become heads: [.., pos, head * d_head] or already [.., head, pos, d_head].

    rotate(x, sign, constants) turns queries and keys by their positions (sign -1 pulls coefficients back), where the model does it between
    the HookPoints; `soft_cap` is Gemma2's c in c tanh(r / c); `bias(scores)` gives what is added to rebuilt scores, -inf where they are
    masked; adds_bias: a position bias (ALiBi, T5) is added to the scores, which keeps a share of a single run's relevance;
    queries_are_split, values_are_split: queries and keys, or values, come with their heads already apart. Values may be of another size
    than queries and keys (d_value, DeepSeek-V3).
    """

    def __init__(
        self,
        n_heads: int,
        n_key_value_heads: int,
        d_head: int,
        *,
        scale: float,
        soft_cap: float | None = None,
        rotate: Rotation | None = None,
        bias: Callable[[Float[Tensor, "*lead head query key"]], Float[Tensor, "*_scores"] | None] | None = None,
        queries_are_split: bool = False,
        adds_bias: bool = False,
        values_are_split: bool = False,
        d_value: int | None = None,
    ) -> None:
        self.n_heads, self.n_key_value_heads, self.d_head = n_heads, n_key_value_heads, d_head
        self.scale, self.soft_cap, self.rotate, self.bias = scale, soft_cap, rotate, bias
        self.queries_are_split, self.adds_bias = queries_are_split, adds_bias
        self.values_are_split, self.d_value = values_are_split, d_head if d_value is None else d_value

    @property
    def group(self) -> int:
        return self.n_heads // self.n_key_value_heads

    def split(self, x: Float[Tensor, "*lead pos head_x_d_head"]) -> Float[Tensor, "*lead head pos d_head"]:
        """What a linear layer writes, head by head."""
        return working(x).unflatten(-1, (-1, self.d_head)).transpose(-2, -3)

    def merge(self, x: Float[Tensor, "*lead head pos d_head"]) -> Float[Tensor, "*lead pos head_x_d_head"]:
        """The heads side by side again."""
        return x.transpose(-2, -3).flatten(-2)

    def expand(self, x: Float[Tensor, "*lead kv_head pos d_head"]) -> Float[Tensor, "*lead head pos d_head"]:
        """Key-value heads repeated for their group of query heads (GQA)."""
        return x if self.group == 1 else x.repeat_interleave(self.group, dim=-3)

    def reduce(self, x: Float[Tensor, "*lead head pos d_head"]) -> Float[Tensor, "*lead kv_head pos d_head"]:
        """Coefficients of a group of query heads summed at their key-value head."""
        return x if self.group == 1 else x.unflatten(-3, (self.n_key_value_heads, self.group)).sum(-3)

    def values(self, v: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_lead kv_head pos d_value"]:
        """Values, head by head."""
        return working(v) if self.values_are_split else self.split(v)

    def split_z(self, z: Float[Tensor, "*lead pos head_x_d_value"]) -> Float[Tensor, "*lead head pos d_value"]:
        """The heads' outputs, head by head."""
        return working(z).unflatten(-1, (-1, self.d_value)).transpose(-2, -3)

    def queries_keys(self, inputs: Tensors) -> tuple[Float[Tensor, "*lead head query d_head"], Float[Tensor, "*lead kv_head key d_head"]]:
        """Queries and keys as they meet in the product."""
        q, k = (working(x) if self.queries_are_split else self.split(x) for x in inputs[:2])
        if self.rotate is not None:
            q, k = self.rotate(q, 1, inputs[2:]), self.rotate(k, 1, inputs[2:])
        return q, k


class Scores(Product):
    """(q, k[, rotary constants]) -> attention scores before the softmax.

    Recomputed without the mask, but where the geometry says what is added to rebuilt scores.
    """

    kind = "scores"
    column = "scores"
    n_relevant = 2

    def __init__(self, geometry: AttentionGeometry) -> None:
        self.geometry = geometry

    @property
    def parts(self) -> tuple[str, ...]:
        return ("scores",) if self.geometry.soft_cap is None else ("scores", "soft_cap")

    @property
    def is_bare(self) -> bool:
        return self.geometry.soft_cap is None and not self.geometry.adds_bias

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        rule, cap = rules["scores"], rules.get("soft_cap", GRADIENT)
        if len(rules) == 1 or (cap.is_plain and (rule.is_plain or rule.on_output)):
            return rule  # the model's own graph passes the soft-cap
        return CappedScoresRule(product(rule), elementwise(cap))

    def operands(self, inputs: Tensors) -> tuple[Float[Tensor, "*_lead head query d_head"], Float[Tensor, "*_lead kv_head key d_head"]]:
        return self.geometry.queries_keys(inputs)

    def raw(self, inputs: Tensors) -> Float[Tensor, "*_lead head query key"]:
        """Before the soft-cap."""
        q, k = self.operands(inputs)
        return q @ self.geometry.expand(k).transpose(-1, -2) * self.geometry.scale

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        cap, scores = self.geometry.soft_cap, self.raw(inputs)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        added = None if self.geometry.bias is None else self.geometry.bias(scores)
        return scores if added is None else scores + added

    def back(
        self,
        upstream: Float[Tensor, "*_lead head query key"],
        for_second: Float[Tensor, "*_lead kv_head key d_head"],
        for_first: Float[Tensor, "*_lead head query d_head"],
        constants: Tensors,
    ) -> Coefficients:
        """Coefficients at the raw q and k of coefficients at the scores before the soft-cap."""
        geometry = self.geometry
        coefficients: Tensors = (
            upstream @ geometry.expand(for_second) * geometry.scale,
            geometry.reduce(upstream.transpose(-1, -2) @ for_first * geometry.scale),
        )
        if geometry.rotate is not None:
            coefficients = tuple(geometry.rotate(c, -1, constants) for c in coefficients)
        if not geometry.queries_are_split:
            coefficients = tuple(geometry.merge(c) for c in coefficients)
        return (*coefficients, *(None for _ in constants))


class Mix(Product):
    """(pattern, v) -> z."""

    kind = "z"
    column = "product"

    def __init__(self, geometry: AttentionGeometry) -> None:
        self.geometry = geometry

    def operands(self, inputs: Tensors) -> tuple[Float[Tensor, "*_lead head query key"], Float[Tensor, "*_lead kv_head key d_value"]]:
        return working(inputs[0]), self.geometry.values(inputs[1])

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        pattern, v = self.operands(inputs)
        return self.geometry.merge(pattern @ self.geometry.expand(v))

    def back(
        self,
        upstream: Float[Tensor, "*_lead query head_x_d_value"],
        for_second: Float[Tensor, "*_lead kv_head key d_value"],
        for_first: Float[Tensor, "*_lead head query key"],
        constants: Tensors,
    ) -> Coefficients:
        """Coefficients at the pattern and the raw v."""
        g = self.geometry.split_z(upstream)
        to_v = self.geometry.reduce(for_first.transpose(-1, -2) @ g)
        return g @ self.geometry.expand(for_second).transpose(-1, -2), to_v if self.geometry.values_are_split else self.geometry.merge(to_v)


class CappedScoresRule(Rule):
    """How relevance passes the product of queries and keys, and how it passes the soft-cap on it.

    The soft-cap's rule sees scores in units of the cap: its function is tanh, at r / c.

    Source: ours; the two rules that it calls have sources of their own.
    """

    def __init__(self, product: ProductRule, soft_cap: ElementwiseRule) -> None:
        self.product, self.soft_cap = product, soft_cap

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.product.needs_reference or self.soft_cap.needs_reference

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        assert isinstance(op, Scores)
        others = None if reference is None else reference.inputs
        slope = cap_slope(op, self.soft_cap, inputs, reference=others)
        factors = self.product.factors_at(*op.operands(inputs), None if others is None else op.operands(others))
        return (*factors, slope, *op.constants(inputs))

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, Scores)
        return op.back(working(upstream) * kept[2], kept[0], kept[1], tuple(kept[3:]))

    @property
    def is_exact(self) -> bool:
        return self.product.is_exact and self.soft_cap.is_exact

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        if reference is not None and self.is_exact:
            return nothing_kept(upstream)
        return super().sink(op, inputs, output, reference, upstream)


def cap_slope(op: Scores, rule: ElementwiseRule, inputs: Tensors, *, reference: Tensors | None) -> Float[Tensor, "*_lead head query key"]:
    """The slope of the soft-cap at the scores of these queries and keys."""
    cap, other = op.geometry.soft_cap, None
    assert cap is not None
    r = op.raw(inputs) / cap
    if reference is not None and rule.needs_reference:
        r2 = op.raw(reference) / cap
        other = (r2, torch.tanh(r2))
    return rule.slope_at(torch.tanh, r, torch.tanh(r), other)


def by_head(rule: Rule) -> tuple[ProductRule, ElementwiseRule] | None:
    """A rule of scores or z as the rules of its product and of a soft-cap, for what looks inside heads; None for a rule of another kind."""
    if isinstance(rule, CappedScoresRule):
        return rule.product, rule.soft_cap
    return (product(rule), GRADIENT) if rule.is_plain or isinstance(rule, ProductRule) else None
