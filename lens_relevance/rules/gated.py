"""Gated activations, y = f(gate) * up (SwiGLU, GeGLU, ReGLU), and their rule: that of the activation and that of the product, called.

The gate of GPT-OSS, y = f(min(gate, limit)) * (clamp(up, -limit, limit) + 1) with f(x) = x sigmoid(alpha x), is the sum of a product,
act(gate) * clamp(up), and of act(gate) alone. The product follows the rule for products; what act(gate) passes alone goes to the gate, by
the rule for activations, under any rule for the product; the clamp of `up` is an element-wise function like any other. So rules that
conserve on SwiGLU conserve here too (derived here).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.rules.activation import ElementwiseRule, Function
from lens_relevance.rules.base import Coefficients, Kept, Operation, Output, PerExample, Reference, Rule, Tensors, nothing_kept, working
from lens_relevance.rules.product import ProductRule, elementwise, product


class GatedActivation(Operation):
    """y = f(gate) * up, element by element."""

    kind = "gate"
    column = "gate"

    def __init__(self, function: Function, name: str = "") -> None:
        self.function, self.name = function, name

    @property
    def parts(self) -> tuple[str, ...]:
        return ("activation", "gate")

    def compose(self, rules: Mapping[str, Rule]) -> GatedRule:
        return GatedRule(elementwise(rules["activation"]), product(rules["gate"]))

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        return self.function(inputs[0]) * inputs[1]


class ClampedGate(GatedActivation):
    """y = act(gate) * (clamp(up) + 1)."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__(lambda gate: (x := gate.clamp(max=limit)) * torch.sigmoid(alpha * x), f"clamped swish {alpha:g}, {limit:g}")
        self.clamp: Function = lambda up: up.clamp(-limit, limit)

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        return self.function(inputs[0]) * (self.clamp(inputs[1]) + 1)


class GatedRule(Rule):
    """How relevance passes the activation on the gate, and how it passes the product.

    Source: ours; the two rules that it calls have sources of their own.
    """

    def __init__(self, activation: ElementwiseRule, product: ProductRule) -> None:
        self.activation, self.product = activation, product

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.activation.needs_reference or self.product.needs_reference

    @property
    def is_plain(self) -> bool:
        return self.activation.is_plain and self.product.is_plain

    def conserves(self, op: GatedActivation) -> bool:
        """Whether all relevance of the output goes to gate and up; of a constant gate the activation's rule is not asked."""
        held = self.product.holds_first and not isinstance(op, ClampedGate)
        return self.product.factors_conserve and (held or self.activation.slope_conserves)

    @property
    def is_exact(self) -> bool:
        """Whether nothing stays behind between two runs."""
        return self.activation.is_exact and self.product.is_exact

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        assert isinstance(op, GatedActivation)
        return self.passed(op, inputs, None if reference is None else reference.inputs)

    def passed(
        self, op: GatedActivation, inputs: Tensors, reference: Tensors | None
    ) -> tuple[Float[Tensor, "*_shape"], Float[Tensor, "*_shape"]]:
        """What the coefficient at the output is multiplied with at the gate, and at up; reference: the reference run's inputs."""
        gate, up = (working(x) for x in inputs)
        clamp = op.clamp if isinstance(op, ClampedGate) else None
        act, factor = op.function(gate), up if clamp is None else clamp(up)
        gates = ups = factors = None
        if reference is not None and self.needs_reference:
            other_gate, other_up = (working(x) for x in reference)
            other_act, other_factor = op.function(other_gate), other_up if clamp is None else clamp(other_up)
            gates, ups, factors = (other_gate, other_act), (other_up, other_factor), (other_act, other_factor)
        for_up, for_act = self.product.factors_at(act, factor, factors)
        if clamp is None:
            if self.product.holds_first:
                return for_up, for_act
            return self.activation.slope_at(op.function, gate, act, gates) * for_up, for_act
        slope = self.activation.slope_at(op.function, gate, act, gates)
        return slope * for_up + slope, for_act * self.activation.slope_at(clamp, up, factor, ups)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        upstream = working(upstream)
        return upstream * kept[0], upstream * kept[1]

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        assert isinstance(op, GatedActivation)
        if self.is_exact if reference is not None else self.conserves(op):
            return nothing_kept(upstream)
        return super().sink(op, inputs, output, reference, upstream)
