"""By how much the gradient that a model passes through an operation differs from that of the operation recomputed.

A component may give the right value and cut off a part of its gradient (of half of the heads, of some neurons): the value alone does not
show it. For a direction r at the output, J^T r of the model's own graph is held against J^T r of the operation recomputed from the same
inputs. Where every step in between is a function of its argument alone (`keeps_gradients_whole`), no part of a gradient can be lost, and
there is nothing to compare.
Weights, biases in a matrix product and what is added to a statistic of each row (eps) are taken for constants: a detached copy hidden there
is not noticed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lens_relevance.hooks.linear_steps import Edge, edge_of, pulled_back
from lens_relevance.rules import Scores, Softmax
from lens_relevance.rules.base import Operation, Traced, working
from lens_relevance.rules.softmax import is_masked


def gradient_off_by(traced: Traced, x: Tensor, inputs: Sequence[Tensor], direction: Tensor) -> float | None:
    """By how much the gradient from an output to its inputs differs from the operation's, relative to the largest of their sizes.

    The size is that of what is expected, or |r| |y| / |x| where that is larger: what is lost of a gradient that is next to nothing (of a
    softmax with one weight of nearly 1) changes no relevance, and rounding alone makes it differ.

    Args:
        traced: What the site says that the model computes, recomputed from the inputs.
        x: The output, as the model computed it.
        inputs: The tensors that it was computed from, on the model's graph.
        direction: r, of the shape of the output.

    Returns:
        The largest difference over the inputs; None where it cannot be compared, as values are not finite.
    """
    operation = traced.operation
    values = {edge_of(value): value.detach() for value in inputs[: operation.n_relevant]}
    with torch.no_grad():
        y, r, off = x.detach(), direction, 0.0
        if isinstance(operation, Scores):
            hidden = is_masked(y)
            y, r = torch.where(hidden, 0.0, y), torch.where(hidden, 0.0, r)
        expected = dict[Edge, Tensor]()
        for edge, gradient in zip(map(edge_of, inputs[: operation.n_relevant]), traced.gradient(working(r)), strict=False):
            assert gradient is not None  # an input that is read twice has the sum
            expected[edge] = expected[edge] + working(gradient) if edge in expected else working(gradient)
        passed = pulled_back(edge_of(x), r, values)
        for edge, gradient in expected.items():
            difference = gradient - working(passed[edge]).to(gradient.device) if edge in passed else gradient
            size = torch.maximum(gradient.norm(), _natural_size(operation, working(values[edge]), working(y), working(r)))
            off_here = difference.norm() / size.clamp(min=1e-30)
            if not off_here.isfinite():
                return None
            off = max(off, float(off_here))
    return off


def _natural_size(operation: Operation, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """|r| |y| / |x|, the size of a gradient of y along r if y were in proportion to x; a softmax has no such unit of its scores."""
    if isinstance(operation, Softmax):
        return (r * y).norm()
    return r.norm() * y.norm() / x.norm().clamp(min=1e-30)
