"""The gated activation of GPT-OSS: y = f(min(gate, limit)) * (clamp(up, -limit, limit) + 1), f(x) = x sigmoid(alpha x).

It is the sum of a product, act(gate) * clamp(up), and of act(gate) alone. The product follows the rule for gated MLPs; what act(gate)
passes alone goes to the gate, by the rule for activations, under any rule for the product; the clamp of `up` is an element-wise
function like any other. So a rule that conserves on SwiGLU conserves here too (derived here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lens_relevance.rules.activation import Function, Gated, GatedActivation, derivative, identity_factor, rescale_factor
from lens_relevance.rules.base import Reference, Tensors, working


class ClampedGate(GatedActivation):
    """y = act(gate) * (clamp(up) + 1)."""

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__(lambda gate: (x := gate.clamp(max=limit)) * torch.sigmoid(alpha * x), f"clamped swish {alpha:g}, {limit:g}")
        self.clamp: Function = lambda up: up.clamp(-limit, limit)

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.function(inputs[0]) * (self.clamp(inputs[1]) + 1)


def gate_factors(rule: Gated, op: GatedActivation, inputs: Tensors, reference: Reference | None) -> Tensors:
    """Factors of the gate's and of up's coefficient under a rule for gated activations, for either kind of gate."""
    if not isinstance(op, ClampedGate):
        return rule.keep(op, inputs, inputs[0], reference)
    (gate, up), others = (working(x) for x in inputs), (None if reference is None else tuple(working(x) for x in reference.inputs))
    clamped = (gate, op.clamp(up))
    pair = None if others is None else Reference((others[0], op.clamp(others[1])), others[0])
    to_gate, to_up = rule.keep(GatedActivation(op.function), clamped, gate, pair)
    alone = _slope(rule.activation, op.function, gate, None if others is None else others[0])
    return to_gate + alone, to_up * _slope(rule.activation, op.clamp, up, None if others is None else others[1])


def _slope(kind: str, function: Function, x: Tensor, other: Tensor | None) -> Tensor:
    """The factor of an element-wise function under the rule for activations."""
    if kind == "rescale":
        assert other is not None
        return rescale_factor(function, x, function(x), other, function(other))
    return identity_factor(function, x, function(x)) if kind == "identity" else derivative(function, x)
