"""Linear layers y = W x + b.

| rule | backward | source |
|---|---|---|
| `ZeroRule` | the plain gradient; the bias keeps its share | LRP-0, Montavon et al. 2019 |
| `EpsilonRule` | upstream times y / (y + eps sign y), then as LRP-0: weak, contradictory evidence is absorbed | Bach et al. 2015 |
| `GammaRule` | contributions x_i w_ij of the sign of y_j weighted by 1 + gamma | Montavon et al. 2019; signed form as in AttnLRP for ViT |

For vision transformers AttnLRP (Achtibat et al. 2024, arXiv 2402.05602) has gamma on the linear layers, because the gradient of an image's
patches is noisy. As a ruleset:

    with_gamma = {**rulesets()["attnlrp"], "linear": GammaRule(0.25)}
    propagate(vit, image, logit("cat"), with_gamma).patches()

Which layers and which gamma is our reading, the paper's appendix could not be seen: every linear layer (q, k, v, o, in, out and the head),
as in the authors' published examples, which search gamma between 0 and 1 by eye. `"linear@in"` and `"linear@out"` put it on the MLP alone.
The projection of the patches, which they give a gamma of its own, lies below the embedding, where our relevance ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lens_relevance.rules.base import Coefficients, Operation, Reference, Rule, Tensors, nothing_kept, per_example, share, working


class Linear(Operation):
    """y = x W^T + b, for the weight as [d_out, d_in]."""

    kind = "linear"
    column = "biases"

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        rule = super().compose(rules)
        return ZeroRule() if rule.is_plain else rule

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = working(inputs[0])
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class LinearRule(Rule):
    """Base of the rules for linear layers."""


class ZeroRule(LinearRule):
    """The plain gradient; the bias keeps its share (LRP-0, Montavon et al. 2019). Between two runs the bias has no share."""

    @property
    def is_plain(self) -> bool:
        return True

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        bias: Tensor | None = getattr(op, "bias", None)
        if bias is None or reference is not None:
            return nothing_kept(upstream)
        return per_example(share(bias.expand_as(upstream), upstream))


class EpsilonRule(LinearRule):
    """Relevance of an output shrinks by y / (y + eps sign y) before it is passed on; eps has the units of y."""

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = epsilon

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        size = working(output).abs()
        return (size / (size + self.epsilon),)

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        assert isinstance(op, Linear)
        upstream = working(upstream) * kept[0]
        return (upstream @ op.weight.to(upstream.dtype),)


class GammaRule(EpsilonRule):
    """Contributions of the sign of the output count 1 + gamma times; the bias likewise keeps its share."""

    def __init__(self, gamma: float = 0.25, epsilon: float = 0.0) -> None:
        super().__init__(epsilon)
        self.gamma = gamma

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        """Per output: y / (y + gamma * (its contributions of y's sign)), split by the sign of y; and the input, for its signs."""
        assert isinstance(op, Linear)
        x, y = working(inputs[0]), working(output)
        weight = op.weight.to(x.dtype)
        bias = torch.zeros_like(y[..., :1]) if op.bias is None else op.bias.to(x.dtype)
        rising = x.clamp(min=0) @ weight.clamp(min=0).T + x.clamp(max=0) @ weight.clamp(max=0).T + bias.clamp(min=0)
        falling = x.clamp(min=0) @ weight.clamp(max=0).T + x.clamp(max=0) @ weight.clamp(min=0).T + bias.clamp(max=0)
        total = y + self.gamma * torch.where(y > 0, rising, falling)
        ratio = y / torch.where(total == 0, torch.ones_like(y), total + self.epsilon * total.sign())
        return ratio * (y > 0), ratio * (y <= 0), x.sign()

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        assert isinstance(op, Linear)
        up, down = working(upstream) * kept[0], working(upstream) * kept[1]
        weight = op.weight.to(up.dtype)
        plus, minus = weight.clamp(min=0), weight.clamp(max=0)
        at_positive, at_negative = up @ plus + down @ minus, up @ minus + down @ plus
        return ((up + down) @ weight + self.gamma * torch.where(kept[2] > 0, at_positive, at_negative * (kept[2] < 0)),)
