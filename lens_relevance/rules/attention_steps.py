"""The steps of attention as operations: scores = scale * q k^T (soft-capped, masked), pattern = softmax(scores), z = pattern v."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.rules.base import Coefficients, Operation, Tensors, working
from lens_relevance.rules.softmax import masked_softmax


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
        scale: float,
        soft_cap: float | None = None,
        rotate: Callable[[Tensor, int, Tensors], Tensor] | None = None,
        bias: Callable[[Tensor], Tensor | None] | None = None,
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

    def split(self, x: Tensor) -> Float[Tensor, "... head pos d_head"]:
        return working(x).unflatten(-1, (-1, self.d_head)).transpose(-2, -3)

    def merge(self, x: Tensor) -> Float[Tensor, "... pos head_x_d_head"]:
        return x.transpose(-2, -3).flatten(-2)

    def expand(self, x: Tensor) -> Tensor:
        """Key-value heads repeated for their group of query heads (GQA)."""
        return x if self.group == 1 else x.repeat_interleave(self.group, dim=-3)

    def reduce(self, x: Tensor) -> Tensor:
        """Coefficients of a group of query heads summed at their key-value head."""
        return x if self.group == 1 else x.unflatten(-3, (self.n_key_value_heads, self.group)).sum(-3)

    def values(self, v: Tensor) -> Float[Tensor, "... head pos d_value"]:
        return working(v) if self.values_are_split else self.split(v)

    def split_z(self, z: Tensor) -> Float[Tensor, "... head pos d_value"]:
        return working(z).unflatten(-1, (-1, self.d_value)).transpose(-2, -3)

    def queries_keys(self, inputs: Tensors) -> tuple[Tensor, Tensor]:
        """q and k as they meet in the product: [.., head, pos, d_head] and [.., kv head, pos, d_head]."""
        q, k = (working(x) if self.queries_are_split else self.split(x) for x in inputs[:2])
        if self.rotate is not None:
            q, k = self.rotate(q, 1, inputs[2:]), self.rotate(k, 1, inputs[2:])
        return q, k


class Scores(Operation):
    """(q, k[, rotary constants]) -> attention scores before the softmax.

    Recomputed without the mask, but where the geometry says what is added to rebuilt scores.
    """

    kind = "scores"
    factors = 2

    def __init__(self, geometry: AttentionGeometry) -> None:
        self.geometry = geometry

    def raw(self, inputs: Tensors) -> Tensor:
        q, k = self.geometry.queries_keys(inputs)
        return q @ self.geometry.expand(k).transpose(-1, -2) * self.geometry.scale

    def __call__(self, *inputs: Tensor) -> Tensor:
        cap, scores = self.geometry.soft_cap, self.raw(inputs)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        added = None if self.geometry.bias is None else self.geometry.bias(scores)
        return scores if added is None else scores + added

    def back(self, upstream: Tensor, q: Tensor, k: Tensor, constants: Tensors) -> Coefficients:
        """Coefficients at the raw q and k, for given values of the other factor."""
        geometry = self.geometry
        coefficients: Tensors = (
            upstream @ geometry.expand(k) * geometry.scale,
            geometry.reduce(upstream.transpose(-1, -2) @ q * geometry.scale),
        )
        if geometry.rotate is not None:
            coefficients = tuple(geometry.rotate(c, -1, constants) for c in coefficients)
        if not geometry.queries_are_split:
            coefficients = tuple(geometry.merge(c) for c in coefficients)
        return (*coefficients, *(None for _ in constants))


class Softmax(Operation):
    """scores -> pattern.

    sinks: a score per head of one more column, to which attention can go without a value being read there (GPT-OSS).
    """

    kind = "pattern"

    def __init__(self, sinks: Float[Tensor, " head"] | None = None) -> None:
        self.sinks = sinks

    def with_sink(self, scores: Tensor) -> Float[Tensor, "... head query keys"]:
        """The scores and, last, that of the sink, where there is one."""
        scores = working(scores)
        if self.sinks is None:
            return scores
        return torch.cat([scores, self.sinks.to(scores).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)

    def real(self, columns: Float[Tensor, "... head query keys"]) -> Float[Tensor, "... head query key"]:
        """Without the sink's column."""
        return columns if self.sinks is None else columns[..., :-1]

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.real(masked_softmax(self.with_sink(inputs[0])))


class Mix(Operation):
    """(pattern, v) -> z."""

    kind = "z"

    def __init__(self, geometry: AttentionGeometry) -> None:
        self.geometry = geometry

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.geometry.merge(working(inputs[0]) @ self.geometry.expand(self.geometry.values(inputs[1])))

    def back(self, upstream: Tensor, pattern: Tensor, v: Tensor) -> Coefficients:
        """Coefficients at the pattern and the raw v, for given values of the other factor."""
        g = self.geometry.split_z(upstream)
        to_v = self.geometry.reduce(pattern.transpose(-1, -2) @ g)
        return g @ self.geometry.expand(v).transpose(-1, -2), to_v if self.geometry.values_are_split else self.geometry.merge(to_v)
