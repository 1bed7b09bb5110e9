"""Linear layers and convolutions, y = W x + b.

| rule | backward | source |
|---|---|---|
| `ZeroRule` | the plain gradient; the bias keeps its share | LRP-0, Montavon et al. 2019 |
| `EpsilonRule` | upstream times y / (y + eps sign y), then as LRP-0: weak, contradictory evidence is absorbed | Bach et al. 2015 |
| `GammaRule` | contributions x_i w_ij of the sign of y_j weighted by 1 + gamma | Montavon et al. 2019; signed form as in AttnLRP for ViT |
| `ZPlusRule` | positive contributions x_i w_ij alone, in proportion | alpha-beta rule with alpha 1 and beta 0 (Bach et al. 2015) |

For vision transformers, whose gradients are noisy, AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) has gamma on linear layers: the ruleset
`cp_lrp_gamma` (see ruleset_tables.py) has it where the authors' published examples do. Other layers are chosen by place and depth:

    rules = {**rulesets()["cp_lrp"], "linear@mlp.in": GammaRule(0.25), "linear@mlp.out[-4:]": GammaRule(1.0)}
    propagate(vit, image, logit("cat"), rules=rules).patches()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.grad import conv2d_input

from lens_relevance.rules.base import (
    Coefficients,
    Kept,
    Operation,
    Output,
    PerExample,
    Reference,
    Rule,
    Tensors,
    nothing_kept,
    per_example,
    ratio,
    share,
    working,
)


class LinearOperation(Operation):
    """y = W x + b for some map W: a linear layer, a convolution."""

    kind = "linear"
    column = "biases"

    def __init__(self, weight: Float[Tensor, "*_weight"], bias: Float[Tensor, " d_out"] | None) -> None:
        self.weight, self.bias = weight, bias

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        rule = super().compose(rules)
        return ZeroRule() if rule.is_plain else rule

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        x = working(inputs[0])
        y = self.apply(x, self.weight.to(x.dtype))
        return y if self.bias is None else y + self.along_outputs(self.bias.to(x.dtype))

    def apply(self, x: Float[Tensor, "*_hook"], weight: Float[Tensor, "*_weight"]) -> Float[Tensor, "*_output"]:
        """W x with this weight in the place of the layer's own."""
        raise NotImplementedError

    def transpose(
        self, upstream: Float[Tensor, "*_output"], weight: Float[Tensor, "*_weight"], x: Float[Tensor, "*_hook"]
    ) -> Float[Tensor, "*_hook"]:
        """W^T g with this weight; upstream, and with it what is returned, may have leading axes; x has the shape of the input."""
        raise NotImplementedError

    def along_outputs(self, bias: Float[Tensor, " d_out"]) -> Float[Tensor, " d_out *ones"]:
        """The bias in a shape that broadcasts over the output."""
        return bias


class Linear(LinearOperation):
    """y = x W^T + b, for the weight as [d_out, d_in]."""

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        x = working(inputs[0])
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def along(self, direction: Float[Tensor, " d_out"], *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_token"]:
        x = working(inputs[0])
        y = x @ (direction.to(self.weight.dtype) @ self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype) @ direction.to(x.dtype)

    def apply(self, x: Float[Tensor, "*token d_in"], weight: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "*token d_out"]:
        return x @ weight.T

    def transpose(
        self, upstream: Float[Tensor, "*lead d_out"], weight: Float[Tensor, "d_out d_in"], x: Float[Tensor, "*token d_in"]
    ) -> Float[Tensor, "*lead d_in"]:
        return upstream @ weight


class Convolution(LinearOperation):
    """A convolution of [batch, channel, height, width], for the weight as [d_out, channel / groups, height, width] (a patch embedding)."""

    def __init__(
        self,
        weight: Float[Tensor, "d_out channel_per_group kernel_height kernel_width"],
        bias: Float[Tensor, " d_out"] | None,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(weight, bias)
        self.settings: dict[str, Any] = dict(stride=stride, padding=padding, dilation=dilation, groups=groups)

    def apply(
        self, x: Float[Tensor, "batch channel height width"], weight: Float[Tensor, "d_out channel_per_group kernel_height kernel_width"]
    ) -> Float[Tensor, "batch d_out rows columns"]:
        return torch.nn.functional.conv2d(x, weight, **self.settings)

    def transpose(
        self,
        upstream: Float[Tensor, "*lead d_out rows columns"],
        weight: Float[Tensor, "d_out channel_per_group kernel_height kernel_width"],
        x: Float[Tensor, "batch channel height width"],
    ) -> Float[Tensor, "*lead channel height width"]:
        images = upstream.flatten(0, -4)
        passed = conv2d_input((len(images), *x.shape[1:]), weight, images, **self.settings)
        return passed.reshape(*upstream.shape[:-3], *x.shape[1:])

    def along_outputs(self, bias: Float[Tensor, " d_out"]) -> Float[Tensor, "d_out 1 1"]:
        return bias[:, None, None]


class AddedBias(Operation):
    """y = x + b. Every rule passes it unchanged; the bias keeps its share."""

    kind = "bias"
    column = "biases"

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        return ZeroRule()

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        x = working(inputs[0])
        return x + self.bias.to(x.dtype)


class LinearRule(Rule):
    """Base of the rules for linear layers and convolutions."""


class ZeroRule(LinearRule):
    """The plain gradient; the bias keeps its share (LRP-0, Montavon et al. 2019). Between two runs the bias has no share."""

    @property
    def is_plain(self) -> bool:
        return True

    @property
    def is_exact(self) -> bool:
        return True

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        bias: Tensor | None = getattr(op, "bias", None)
        if bias is None or reference is not None:
            return nothing_kept(upstream)
        bias = op.along_outputs(bias) if isinstance(op, LinearOperation) else bias
        return per_example(share(bias.expand_as(upstream), upstream))


class FewOutputsRule(ZeroRule):
    """`ZeroRule`, computed for those outputs alone that have a coefficient: a target reads few of the logits of a large vocabulary."""

    @property
    def is_plain(self) -> bool:
        return False

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        x = inputs[0]
        return (x.new_zeros(()).expand_as(x),)  # only its shape

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, Linear)
        read = _few_read(upstream)
        return (op.transpose(upstream[..., read], op.weight[read].to(upstream.dtype), kept[0]),)


class EpsilonRule(LinearRule):
    """Relevance of an output shrinks by y / (y + eps sign y) before it is passed on; eps has the units of y.

    Source: Bach et al. 2015.
    """

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        size, x = working(output).abs(), working(inputs[0])
        return size / (size + self.epsilon), x.new_zeros(()).expand_as(x)  # of the input only its shape

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, LinearOperation)
        upstream = working(upstream) * kept[0]
        return (op.transpose(upstream, op.weight.to(upstream.dtype), kept[1]),)


class GammaRule(EpsilonRule):
    """Contributions of the sign of the output count 1 + gamma times; the bias likewise keeps its share.

    Source: Montavon et al. 2019; the form for outputs of both signs as in AttnLRP for vision transformers (arXiv 2402.05602).
    """

    def __init__(self, gamma: float = 0.25, epsilon: float = 0.0) -> None:
        super().__init__(epsilon)
        self.gamma = gamma

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        """Per output: y / (y + gamma * (its contributions of y's sign)), split by the sign of y; and the input, for its signs."""
        assert isinstance(op, LinearOperation)
        x, y = working(inputs[0]), working(output)
        weight = op.weight.to(x.dtype)
        bias = y.new_zeros(()) if op.bias is None else op.along_outputs(op.bias.to(x.dtype))
        (above, below), (plus, minus) = _by_sign(x), _by_sign(weight)
        rising = op.apply(above, plus) + op.apply(below, minus) + bias.clamp(min=0)
        falling = op.apply(above, minus) + op.apply(below, plus) + bias.clamp(max=0)
        total = y + self.gamma * torch.where(y > 0, rising, falling)
        ratio = y / torch.where(total == 0, torch.ones_like(y), total + self.epsilon * total.sign())
        return ratio * (y > 0), ratio * (y <= 0), x.sign()

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, LinearOperation)
        up, down, signs = working(upstream) * kept[0], working(upstream) * kept[1], kept[2]
        weight = op.weight.to(up.dtype)
        plus, minus = _by_sign(weight)
        at_positive = op.transpose(up, plus, signs) + op.transpose(down, minus, signs)
        at_negative = op.transpose(up, minus, signs) + op.transpose(down, plus, signs)
        by_sign = torch.where(signs > 0, at_positive, at_negative * (signs < 0))
        return (op.transpose(up + down, weight, signs) + self.gamma * by_sign,)


class ZPlusRule(LinearRule):
    """Only positive contributions count: R_i = sum_j (x_i w_ij)^+ / sum_k (x_k w_kj)^+ R_j.

    This is z+, the alpha-beta rule with alpha 1 and beta 0 (Bach et al. 2015). The bias gets nothing, and what reaches an output without a
    positive contribution ends there.
    """

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        return inputs[0], output

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, LinearOperation)
        upstream, (x, y) = working(upstream), map(working, kept)
        weight = op.weight.to(x.dtype)
        if isinstance(op, Linear):
            read = _few_read(upstream)
            upstream, y, weight = upstream[..., read], y[..., read], weight[read]
        (above, below), (plus, minus) = _by_sign(x), _by_sign(weight)
        positive = op.apply(above, plus) + op.apply(below, minus)
        upstream = upstream * torch.where(positive > 0, ratio(y, positive), 0.0)
        at_positive, at_negative = op.transpose(upstream, plus, x), op.transpose(upstream, minus, x)
        return (torch.where(x > 0, at_positive, at_negative * (x < 0)),)


def _few_read(upstream: Tensor) -> Tensor | slice:
    """Which outputs have a coefficient, where they are at most half (a target reads few of the logits of a large vocabulary); else all."""
    read = upstream.flatten(0, -2).any(0).nonzero().squeeze(1)
    return read if len(read) <= upstream.shape[-1] // 2 else slice(None)


def _by_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    """What is positive, and what is negative."""
    return x.clamp(min=0), x.clamp(max=0)
