"""LayerNorm and RMSNorm, whole or seen in two steps (the scale, then the division by it).

`LNRule`: the standard deviation is a constant, the centring stays (Ali et al. 2022, arXiv 2202.07304).
`PairNorm`: exact between two runs (docs/derivation.md; handlers of SHAP compose to it): c = x - mean(x), v = mean(c^2) + eps, r = v^(-1/2),
dy = w [mean(r1, r2) dc + mean(c1, c2) dr],  dr = -dv / (sqrt(v1 v2) (sqrt(v1) + sqrt(v2))),  dv = mean_features (c1 + c2) dc.
Where a run is flat (its variance within 10 eps, and the other run more than three times as wide), r is huge in one run, and the two terms
are huge and cancel. There the split is that of c = y s into y and s = 1 / r: dy = (dc - mean(y1, y2) ds) / mean(s1, s2), as exact, and
bounded.
`PairLN`: the same without the dr term, the LN-rule between two runs.
`NormIdentity`: relevance stays where it is, feature by feature (Chefer et al. 2021, arXiv 2012.09838).

The two-step form is used while something watches `hook_scale` or `hook_normalized`, so that it finds the right coefficient there. A
`NormRule` of your own is asked for all three steps (`NormScale`, `NormDivide`, and `Norm` for the whole); any other rule with `keep` and
`backward` is asked for the whole alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

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
from lens_relevance.rules.linear import ZeroRule


class Norm(Operation):
    """y = weight * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) + bias; RMSNorm (`centred` False) does not subtract the mean.

    `offset` is added to the weight (Gemma stores weight - 1).
    """

    kind = "norm"
    column = "norm"

    def __init__(
        self, weight: Float[Tensor, " d"] | None, bias: Float[Tensor, " d"] | None, eps: float, *, centred: bool, offset: float = 0.0
    ) -> None:
        self.weight, self.bias, self.eps, self.centred, self.offset = weight, bias, eps, centred, offset

    def centre(self, x: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        """x less its mean, where the norm subtracts it."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*token d"]) -> Float[Tensor, "*token 1"]:
        """The standard deviation (RMS), eps included."""
        return self._scale_of(self.centre(x))

    def _scale_of(self, centred: Tensor) -> Tensor:
        return (centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    def weighted(self, upstream: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        """Coefficients at the output as coefficients at what the weight multiplies."""
        upstream = working(upstream)
        if self.weight is None:
            return upstream
        weight = self.weight.detach().to(upstream.dtype)
        return upstream * (weight + self.offset if self.offset else weight)

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        centred = self.centre(working(inputs[0]))
        y = self.weighted(centred / self._scale_of(centred))
        return y if self.bias is None else y + self.bias.detach().to(y.dtype)


class NormScale(Operation):
    """The first step of a norm: x -> its standard deviation. What scales the gradient of a whole norm does so at the second step."""

    kind = "norm"
    column = "norm"

    def __init__(self, norm: Norm) -> None:
        self.norm = norm

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        rule = super().compose(rules)
        return Rule() if rule.on_output else rule

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        return self.norm.scale(working(inputs[0]))


class NormDivide(Operation):
    """The second step of a norm: (x, scale) -> (x - mean(x)) / scale.

    takes_scale: whether the model divides by the scale that it is handed; otherwise by one that it computes anew, and its own gradient goes
    from here to x alone.
    """

    kind = "norm"
    column = "norm"

    def __init__(self, norm: Norm, takes_scale: Callable[[], bool] = lambda: True) -> None:
        self.norm, self.takes_scale = norm, takes_scale

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        x = working(inputs[0])
        return self.norm.centre(x) / (working(inputs[1]) if self.takes_scale() else self.norm.scale(x))


class NormWeight(Operation):
    """The last step of a norm: weight and bias. Linear, and a part of its norm: no entry of a ruleset is for it."""

    kind = "linear"
    column = "norm_biases"

    def __init__(self, norm: Norm) -> None:
        self.norm, self.bias = norm, norm.bias

    @property
    def parts(self) -> tuple[str, ...]:
        return ()

    def compose(self, rules: Mapping[str, Rule]) -> Rule:
        return ZeroRule()

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        y = self.norm.weighted(inputs[0])
        return y if self.bias is None else y + self.bias.detach().to(y.dtype)


def _norm_of(op: Operation) -> Norm:
    return op if isinstance(op, Norm) else op.norm  # type: ignore[attr-defined]


def _scale_of(op: Operation, inputs: Tensors) -> Tensor:
    """What the operation divides by, of these inputs: in the second step the scale as it is handed over, which hooks may have edited."""
    return working(inputs[1]) if isinstance(op, NormDivide) else _norm_of(op).scale(working(inputs[0]))


class NormRule(Rule):
    """Base of the rules for norms that know them whole (`Norm`) and in steps (`NormScale`, `NormDivide`)."""


def passes_steps(rule: Rule) -> bool:
    """Whether a rule holds for a norm that is seen in steps; one that knows norms whole alone leaves no gradient inside them."""
    return rule.is_plain or rule.on_output or isinstance(rule, NormRule)


class LNRule(NormRule):
    """The standard deviation is a constant; centring and weight stay (Ali et al. 2022).

    Source: Ali et al. 2022, arXiv 2202.07304.
    """

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        return (_scale_of(op, inputs),)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        norm, scale = _norm_of(op), kept[0]
        if isinstance(op, NormScale):  # the scale is a constant
            return (None,)
        coefficient = norm.centre((norm.weighted(upstream) if op is norm else working(upstream)) / scale)
        return (coefficient,) if op is norm else (coefficient, torch.zeros_like(scale))

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        """Only the bias (beta) keeps relevance; between two runs the change of the scale does."""
        if reference is None:
            if not isinstance(op, Norm) or op.bias is None:
                return nothing_kept(upstream)
            return per_example(share(op.bias.expand_as(upstream), upstream))
        return super().sink(op, inputs, output, reference, upstream)

    def column(self, op: Operation, pair: bool) -> str:
        return op.column if pair else "norm_biases"


class NormIdentity(Rule):
    """Each feature of the input gets the relevance of the same feature of the output (Chefer et al. 2021).

    A feature that is exactly 0 at the input can hold none. The rule knows norms whole alone.

    Source: Chefer et al. 2021, arXiv 2012.09838.
    """

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        return (ratio(op(*inputs), working(inputs[0])),)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        return (working(upstream) * kept[0],)


class PairNorm(NormRule):
    """Exact between two runs, and the plain gradient where they are equal.

    Source: derived here (docs/derivation.md); the handlers of SHAP's DeepExplainer compose to it.
    """

    needs_reference = True

    def __init__(self, constant_scale: bool = False) -> None:
        self.constant_scale = constant_scale

    @property
    def is_exact(self) -> bool:
        return not self.constant_scale

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        assert reference is not None
        norm = _norm_of(op)
        c1, c2 = norm.centre(working(inputs[0])), norm.centre(working(reference.inputs[0]))
        s1, s2 = _scale_of(op, inputs), _scale_of(op, reference.inputs)
        mean_r = (1 / s1 + 1 / s2) / 2
        narrow, wide = torch.minimum(s1, s2), torch.maximum(s1, s2)
        flat = (narrow.pow(2) < 11 * norm.eps) & (wide > 3 * narrow)
        if not bool(flat.any()):
            return (mean_r, s1, s2) if self.constant_scale else (mean_r, s1, s2, (c1 + c2) / 2)
        mean_r = torch.where(flat, 2 / (s1 + s2), mean_r)
        if self.constant_scale:
            return mean_r, s1, s2
        return mean_r, s1, s2, (c1 + c2) / 2, torch.where(flat, (s2 * c1 + s1 * c2) / (s1 + s2), (c1 + c2) / 2)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        norm, (mean_r, s1, s2) = _norm_of(op), kept[:3]
        if self.constant_scale:
            if isinstance(op, NormScale):
                return (None,)
            coefficient = norm.centre((norm.weighted(upstream) if op is norm else working(upstream)) * mean_r)
            return (coefficient,) if op is norm else (coefficient, torch.zeros_like(s1))
        mean_c, of_scale = kept[3], kept[-1]  # the same but where a run is flat
        features = mean_c.shape[-1]
        if isinstance(op, NormScale):  # ds = dv / (s1 + s2)
            return (norm.centre(working(upstream) * mean_c * (2 / (features * (s1 + s2)))),)
        g = norm.weighted(upstream) if op is norm else working(upstream)
        towards_r = (g * of_scale).sum(-1, keepdim=True)
        if op is not norm:  # dr = -ds / (s1 s2); the scale's own step follows separately
            return norm.centre(g * mean_r), -towards_r / (s1 * s2)
        return (norm.centre(g * mean_r - mean_c * (towards_r * 2 / (features * s1 * s2 * (s1 + s2)))),)

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        """Nothing stays: the form is exact. With a constant scale, what the change of the scale did."""
        return super().sink(op, inputs, output, reference, upstream) if self.constant_scale else nothing_kept(upstream)


class PairLN(PairNorm):
    """The LN-rule between two runs: mean of the two scales, their difference left out (variant `deeplift_ln`).

    Source: derived here, from the LN-rule (Ali et al. 2022, arXiv 2202.07304).
    """

    def __init__(self) -> None:
        super().__init__(constant_scale=True)
