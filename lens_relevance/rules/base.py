"""What an operation and a rule are.

An *operation* is one step of a model as a plain torch function of the raw tensors at its HookPoints. A *rule* says how relevance passes
back through it: `keep` chooses what to save during the forward, `backward` is a linear function of the upstream coefficients that
broadcasts over leading dimensions, and `sink` is the share of relevance that the rule does not hand on, from a closed form of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

Tensors = tuple[Tensor, ...]
Coefficients = tuple[Tensor | None, ...]


def working(tensor: Tensor) -> Tensor:
    """The tensor in the precision that rules compute in: fp32 at least, so that bf16 models do not lose their sums."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def per_example(tensor: Tensor) -> Float[Tensor, " batch"]:
    """Sum over everything but the first (batch) dimension."""
    return tensor.flatten(1).sum(1) if tensor.ndim > 1 else tensor


def share(value: Tensor, coefficient: Tensor) -> Tensor:
    """Relevance value * coefficient, and exactly 0 where the coefficient is 0 (a masked score is -inf, and -inf * 0 would be NaN)."""
    value, coefficient = working(value), working(coefficient)
    return torch.where(coefficient == 0, torch.zeros_like(coefficient), value * coefficient)


class Operation:
    """One step of a model, as a function of the raw tensors at its input HookPoints."""

    kind: ClassVar[str]
    factors: ClassVar[int | None] = None  # how many of the inputs carry relevance; the rest (rotary cos and sin) are constants. None: all

    def __call__(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} cannot be recomputed from its inputs alone")

    def gradient(self, inputs: Tensors, upstream: Tensor) -> Coefficients:
        """The plain gradient of the operation, recomputed from its inputs (used by the audit, never by the engine)."""
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_(True) for x in inputs[: self.factors]]
            gradients = torch.autograd.grad(self(*leaves, *inputs[len(leaves) :]), leaves, upstream)
            return (*gradients, *(None for _ in inputs[len(leaves) :]))


class Rule:
    """Base of all rules; also the plain gradient, which the engine leaves to autograd.

    `on_output`: the rule only scales what arrives at the operation's output and leaves the rest to the model's own graph.
    `needs_reference`: the rule compares with a reference run (`propagate(..., reference=...)`).
    """

    on_output: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False

    @property
    def is_plain(self) -> bool:
        """Whether autograd already does what this rule asks, so that nothing need be attached."""
        return type(self) is Rule

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        """Tensors to save for `backward`."""
        return ()

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        """Downstream coefficients, one per input (for `on_output` rules: a single one, at the output)."""
        raise NotImplementedError

    def sink(
        self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor
    ) -> Float[Tensor, " batch"]:
        """Relevance at the output less relevance at the inputs, per example; here for the plain gradient."""
        downstream = op.gradient(inputs, upstream)
        return balance(inputs, output, reference, upstream, downstream)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__ if not self.is_plain else 'gradient'}({arguments})".removesuffix("()")


class Reference:
    """What the reference run had at one site: its inputs and its output."""

    __slots__ = ("inputs", "output")

    def __init__(self, inputs: Tensors, output: Tensor) -> None:
        self.inputs, self.output = inputs, output


def difference(value: Tensor, reference: Tensor | None) -> Tensor:
    """value - reference, or the value itself where there is no reference run."""
    return working(value) if reference is None else working(value) - working(reference)


def balance(
    inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor, downstream: Coefficients
) -> Float[Tensor, " batch"]:
    """Relevance at the output less the relevance that `downstream` gives the inputs, per example."""
    refs = (None,) * len(inputs) if reference is None else reference.inputs
    total = per_example(share(difference(output, None if reference is None else reference.output), upstream))
    for value, ref, coefficient in zip(inputs, refs, downstream, strict=True):
        if coefficient is not None:
            total = total - per_example(share(difference(value, ref), coefficient))
    return total
