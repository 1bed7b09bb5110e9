"""Linear layers y = W x + b."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_relevance.rules.base import Operation, Reference, Rule, Tensors, per_example, share, working


class Linear(Operation):
    """y = x W^T + b, for the weight as [d_out, d_in]."""

    kind = "linear"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = working(inputs[0])
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class ZeroRule(Rule):
    """The plain gradient; the bias keeps its share (LRP-0, Montavon et al. 2019). Between two runs the bias has no share."""

    @property
    def is_plain(self) -> bool:
        return True

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        bias: Tensor | None = getattr(op, "bias", None)
        if bias is None or reference is not None:
            return torch.zeros_like(per_example(working(upstream)))
        return per_example(share(bias.expand_as(upstream), upstream))
