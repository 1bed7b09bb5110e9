"""Attention in three steps: scores = scale * q k^T (soft-capped, masked), pattern = softmax(scores), z = pattern v.

| step | rule | backward | source |
|---|---|---|---|
| scores, z | `Scale(1/2)` | half of the gradient to each factor | AttnLRP (2402.05602) eq. 7 |
| pattern | gradient | relevance x_i (R'_i - s_i sum_j R'_j), the plain softmax gradient | AttnLRP eq. 8 |
| pattern | `Scale(0)` | the pattern is a constant (AH-rule) | Ali et al. 2022 |
| pattern | `SoftmaxTemperature(T)` | gradient of softmax(x / T) without the factor 1/T | GIM, arXiv 2505.17630 |
| scores, z | `PairProduct` | dz = mean(v) du + mean(u) dv | derived here |
| pattern | `PairSoftmax` | dp_i = l_i (ds_i - sum_j l_j ds_j / sum_k l_k), l the logarithmic mean of the two patterns | derived here |

A half rule scales the gradient at the product's *output*: that equals the q/4, k/4, v/2 form and leaves every reader in between right.
Upstream tensors may carry leading dimensions before [batch, head, query, key].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_relevance.rules.activation import derivative, identity_factor, rescale_factor
from lens_relevance.rules.attention_steps import Mix, Scores, Softmax
from lens_relevance.rules.base import Coefficients, Operation, Reference, Rule, Tensors, balance, per_example, working
from lens_relevance.rules.softmax import is_masked, logarithmic_mean, masked_softmax, pull_back


class Scale(Rule):
    """The gradient times a constant, at the operation's output: 1/2 for products (uniform rule), 0 to hold the output constant."""

    on_output = True

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        return (upstream * self.factor,)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        product = isinstance(op, Mix) or (isinstance(op, Scores) and op.geometry.soft_cap is None and not op.geometry.adds_bias)
        if product and self.factor == 0.5 and reference is None:  # each factor carries half of the product's relevance
            return torch.zeros_like(per_example(working(upstream)))
        downstream = tuple(None if g is None else g * self.factor for g in op.gradient(inputs, working(upstream)))
        return balance(inputs, output, reference, upstream, downstream)


Half = Scale(0.5)
Constant = Scale(0.0)


class SoftmaxTemperature(Rule):
    """The gradient of softmax(x / T) without the factor 1/T; the forward stays at T = 1 (GIM, arXiv 2505.17630, as described there)."""

    def __init__(self, temperature: float = 2.0) -> None:
        self.temperature = temperature

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert isinstance(op, Softmax)
        scores = op.with_sink(inputs[0])
        return (op.real(masked_softmax(torch.where(is_masked(scores), float("-inf"), scores / self.temperature))),)

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        flat, g = kept[0], working(upstream)
        return (flat * (g - (flat * g).sum(-1, keepdim=True)),)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        return balance(inputs, output, reference, upstream, self.backward(op, self.keep(op, inputs, output, reference), upstream))


class UniformScores(Rule):
    """`part` of the gradient of q k^T to each factor, and a soft-cap passed by its gradient or by the identity rule on the tanh."""

    def __init__(self, part: float = 1.0, identity_cap: bool = False) -> None:
        self.part, self.identity_cap = part, identity_cap

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert isinstance(op, Scores)
        factors, cap = op.geometry.queries_keys(inputs), op.geometry.soft_cap
        if cap is None:
            return (*factors, *inputs[2:])
        raw = op.raw(inputs) / cap
        slope = identity_factor(torch.tanh, raw, torch.tanh(raw)) if self.identity_cap else derivative(torch.tanh, raw)
        return (*factors, slope, *inputs[2:])

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        assert isinstance(op, Scores)
        upstream, rest = working(upstream) * self.part, tuple(kept[2:])
        if op.geometry.soft_cap is not None:
            upstream, rest = upstream * rest[0], rest[1:]
        return op.back(upstream, kept[0], kept[1], rest)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        return balance(inputs, output, reference, upstream, self.backward(op, self.keep(op, inputs, output, reference), upstream))


class PairRule(Rule):
    """Base of the exact pair forms: nothing stays behind."""

    needs_reference = True

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        return torch.zeros_like(per_example(working(upstream)))


class PairProduct(PairRule):
    """A product of two factors between two runs: each factor gets the gradient at the mean of the other's two values (derived here).

    A soft-cap on the scores (Gemma2) is passed by the rescale rule at the raw scores.
    """

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert reference is not None
        if isinstance(op, Mix):
            pattern = (working(inputs[0]) + working(reference.inputs[0])) / 2
            return pattern, op.geometry.values((working(inputs[1]) + working(reference.inputs[1])) / 2)
        assert isinstance(op, Scores)
        q1, k1 = op.geometry.queries_keys(inputs)
        q2, k2 = op.geometry.queries_keys(reference.inputs)
        factors, cap = ((q1 + q2) / 2, (k1 + k2) / 2), op.geometry.soft_cap
        if cap is None:
            return (*factors, *inputs[2:])
        r1, r2 = op.raw(inputs) / cap, op.raw(reference.inputs) / cap
        return (*factors, rescale_factor(torch.tanh, r1, torch.tanh(r1), r2, torch.tanh(r2)), *inputs[2:])

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        if isinstance(op, Mix):
            return op.back(upstream, kept[0], kept[1])
        return UniformScores().backward(op, kept, upstream)


class PairSoftmax(PairRule):
    """The softmax between two runs, exact and shift-invariant; the softmax's own Jacobian where they are equal (derived here)."""

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert reference is not None
        assert isinstance(op, Softmax)
        return (logarithmic_mean(op.with_sink(inputs[0]), op.with_sink(reference.inputs[0])),)

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        assert isinstance(op, Softmax)
        if op.sinks is not None:  # nothing is read at the sink
            upstream = torch.nn.functional.pad(upstream, (0, 1))
        return (op.real(pull_back(kept[0], working(upstream))),)
