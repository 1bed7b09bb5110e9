"""Element-wise activations, alone or as the gate of a gated MLP.

Every rule here multiplies the upstream coefficient by one factor per input, element by element:

| part | choice | factor | source |
|---|---|---|---|
| activation | gradient | f'(x) | |
| activation | identity | f(x) / x, and f'(0) at x = 0 | AttnLRP (2402.05602) eq. 9; Jafari et al. 2024 |
| activation | rescale | (f(x) - f(x')) / (x - x'), f' at the midpoint where x - x' is tiny | DeepLIFT, Shrikumar et al. 2017 |
| product act(gate) * up | half | half of the gradient to each factor | AttnLRP eq. 7; Arras et al. 2019 |
| product | constant | act(gate) is a constant | CP-LRP as LXT applies it |
| product | pair | mean of the two runs' values of the other factor | derived here |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lens_relevance.rules.base import Coefficients, Operation, Reference, Rule, Tensors, balance, per_example, working

Function = Callable[[Tensor], Tensor]


def derivative(function: Function, x: Tensor) -> Tensor:
    """f'(x), element by element."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(function(x).sum(), x)[0]


def identity_factor(function: Function, x: Tensor, y: Tensor) -> Tensor:
    """f(x) / x with y = f(x), and f'(0) at x = 0. No stabiliser is needed: even at small x the quotient is accurate."""
    zero = x == 0
    slope = derivative(function, torch.zeros((), dtype=x.dtype, device=x.device))
    return torch.where(zero, slope, y / torch.where(zero, torch.ones_like(x), x))


def rescale_factor(function: Function, x1: Tensor, y1: Tensor, x2: Tensor, y2: Tensor) -> Tensor:
    """(y1 - y2) / (x1 - x2), and f' at the midpoint where x1 - x2 is so small that the quotient would be rounding noise.

    The noise is about eps * scale / |d| and the midpoint's error about d^2; a threshold of eps^0.4 * scale keeps both small. The scale is
    that of x and y themselves: at a kink in 0 (ReLU) both are no larger than |d|, the quotient is exact there and is used. So it is where
    the midpoint's slope times d misses y1 - y2 by more than rounding: between the two values lies a kink away from 0 (a clamp).
    """
    d, change, eps = x1 - x2, y1 - y2, torch.finfo(x1.dtype).eps
    scale = torch.maximum(torch.maximum(x1.abs(), x2.abs()), torch.maximum(y1.abs(), y2.abs()))
    tiny = d.abs() <= eps**0.4 * scale
    quotient = change / torch.where(d == 0, torch.ones_like(d), d)
    slope = derivative(function, ((x1 + x2) / 2)[tiny]).to(quotient.dtype)
    smooth = (slope * d[tiny] - change[tiny]).abs() <= 16 * eps * scale[tiny]
    quotient[tiny] = torch.where(smooth | (d[tiny] == 0), slope, quotient[tiny])
    return quotient


class Activation(Operation):
    """y = f(x), element by element."""

    kind = "activation"

    def __init__(self, function: Function, name: str = "") -> None:
        self.function, self.name = function, name

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0])


class SoftCap(Activation):
    """y = c tanh(x / c), on the logits of the whole model (Gemma 2)."""

    kind = "soft_cap"

    def __init__(self, cap: float) -> None:
        super().__init__(lambda x: cap * torch.tanh(x / cap), f"soft-cap {cap:g}")


class GatedActivation(Operation):
    """y = f(gate) * up, element by element (SwiGLU, GeGLU, ReGLU)."""

    kind = "gate"

    def __init__(self, function: Function, name: str = "") -> None:
        self.function, self.name = function, name

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0]) * inputs[1]


class ElementwiseRule(Rule):
    """Multiplies by one kept factor per input."""

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        upstream = working(upstream)
        return tuple(upstream * factor for factor in kept)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        return balance(inputs, output, reference, upstream, self.backward(op, self.keep(op, inputs, output, reference), upstream))


def _nothing(upstream: Tensor) -> Tensor:
    return torch.zeros_like(per_example(working(upstream)))


class Identity(ElementwiseRule):
    """f(x) / x (AttnLRP eq. 9): all relevance of the output goes to the input."""

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert isinstance(op, Activation)
        return (identity_factor(op.function, working(inputs[0]), working(output)),)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        return _nothing(upstream) if reference is None else super().sink(op, inputs, output, reference, upstream)


class Rescale(ElementwiseRule):
    """(f(x) - f(x')) / (x - x') (DeepLIFT's rescale rule): exact between two runs."""

    needs_reference = True

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert isinstance(op, Activation) and reference is not None
        x1, x2 = working(inputs[0]), working(reference.inputs[0])
        if output.dtype != x1.dtype:  # the model's own outputs are rounded to bf16; their difference would be mostly rounding
            return (rescale_factor(op.function, x1, op.function(x1), x2, op.function(x2)),)
        return (rescale_factor(op.function, x1, output, x2, reference.output),)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        return _nothing(upstream)


class Gated(ElementwiseRule):
    """A gated MLP: how relevance passes the product, and how it passes the activation on the gate.

    activation: "gradient", "identity" or "rescale". product: "gradient", "half", "constant" or "pair" (see the module's table).
    """

    def __init__(self, activation: str, product: str) -> None:
        self.activation, self.product = activation, product

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return "rescale" in self.activation or self.product == "pair"

    @property
    def is_plain(self) -> bool:
        return self.activation == "gradient" and self.product == "gradient"

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        assert isinstance(op, GatedActivation)
        gate, up = (working(x) for x in inputs)
        act = op.function(gate)
        if self.product == "constant":
            return torch.zeros_like(gate), act
        if self.product == "pair" or self.activation == "rescale":
            assert reference is not None
            gate2, up2 = (working(x) for x in reference.inputs)
            act2 = op.function(gate2)
        if self.activation == "identity":
            slope = identity_factor(op.function, gate, act)
        elif self.activation == "rescale":
            slope = rescale_factor(op.function, gate, act, gate2, act2)
        else:
            slope = derivative(op.function, gate)
        if self.product == "pair":
            return slope * ((up + up2) / 2), (act + act2) / 2
        part = 0.5 if self.product == "half" else 1.0
        return part * slope * up, part * act

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        conserves = (self.activation == "identity" and self.product == "half") or self.product == "constant"
        exact = self.activation == "rescale" and self.product == "pair"
        if exact or (conserves and reference is None):
            return _nothing(upstream)
        return super().sink(op, inputs, output, reference, upstream)
