"""What the rule tests share: run a rule as the engine does, its backward as an explicit matrix, and inputs for hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from lens_relevance.rules import Operation, Reference, Rule

FP64 = torch.float64
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**31 - 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = FP64, scale: float = 1.0) -> Tensor:
    """A seeded standard normal."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)).to(dtype)


def back(
    rule: Rule, operation: Operation, inputs: tuple[Tensor, ...], upstream: Tensor, other: tuple[Tensor, ...] | None = None
) -> tuple[Tensor | None, ...]:
    """Coefficients at the inputs for coefficients at the output; `other` are the reference run's inputs."""
    if rule.on_output:
        (scaled,) = rule.backward(operation, (), upstream)
        leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
        return torch.autograd.grad(operation(*leaves), leaves, scaled)
    reference = None if other is None else Reference(other, operation(*other).to(other[0].dtype))
    kept = rule.keep(operation, inputs, operation(*inputs).to(inputs[0].dtype), reference)
    return rule.backward(operation, kept, upstream)


def sink(rule: Rule, operation: Operation, inputs: tuple[Tensor, ...], upstream: Tensor, other: tuple[Tensor, ...] | None = None) -> Tensor:
    """What the rule says it keeps, per example."""
    reference = None if other is None else Reference(other, operation(*other))
    return rule.sink(operation, inputs, operation(*inputs), reference, upstream)


def remainder(
    rule: Rule, operation: Operation, inputs: tuple[Tensor, ...], upstream: Tensor, other: tuple[Tensor, ...] | None = None
) -> Tensor:
    """What it keeps, by subtraction: relevance at the output less relevance at the inputs, per example."""
    y = operation(*inputs) - (operation(*other) if other is not None else 0)
    left = (y * upstream).flatten(1).sum(1)
    for i, coefficient in enumerate(back(rule, operation, inputs, upstream, other)):
        if coefficient is not None:
            left = left - ((inputs[i] - (other[i] if other is not None else 0)) * coefficient).flatten(1).sum(1)
    return left


def matrix(rule: Rule, operation: Operation, inputs: tuple[Tensor, ...], other: tuple[Tensor, ...] | None = None, index: int = 0) -> Tensor:
    """M[output, input] of a rule on single vectors [1, n]: coefficient at input i of a coefficient 1 at output j."""
    size = operation(*inputs).shape[-1]
    repeated = tuple(x.expand(size, -1) for x in inputs)
    others = None if other is None else tuple(x.expand(size, -1) for x in other)
    coefficient = back(rule, operation, repeated, torch.eye(size, dtype=inputs[0].dtype), others)[index]
    assert coefficient is not None
    return coefficient


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal relative to the largest entry, and not for the reason that everything is zero."""
    assert actual.shape == expected.shape
    assert bool(torch.isfinite(actual).all())
    size = float(expected.abs().max())
    assert size > 0, "comparing zeros proves nothing"
    assert float((actual - expected).abs().max()) <= tolerance * size
