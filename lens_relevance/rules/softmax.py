"""The softmax from attention scores to the pattern, with masked rows and sinks, and the rules that pass it.

| rule | backward | source |
|---|---|---|
| gradient | relevance x_i (R'_i - s_i sum_j R'_j) | AttnLRP (2402.05602) eq. 8 |
| `ConstantOutput` | the pattern is a constant (AH-rule) | Ali et al. 2022 |
| `SoftmaxTemperature(T)` | gradient of softmax(x / T) without the factor 1/T | GIM, arXiv 2505.17630 |
| `SoftmaxIdentity` | relevance of a score is that of its entry of the pattern | Chefer et al. 2021, arXiv 2012.09838 |
| `PairSoftmax` | dp_i = l_i (ds_i - sum_j l_j ds_j / sum_k l_k), l the logarithmic mean of the two patterns | derived here |

Upstream tensors may carry leading dimensions before [batch, head, query, key]. See docs/derivation.md for the pair form.
"""

from __future__ import annotations

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
    ratio,
    working,
)


class Softmax(Operation):
    """scores -> pattern.

    sinks: a score per head of one more column, to which attention can go without a value being read there (GPT-OSS).
    """

    kind = "pattern"
    column = "softmax"

    def __init__(self, sinks: Float[Tensor, " head"] | None = None) -> None:
        self.sinks = sinks

    def with_sink(self, scores: Float[Tensor, "*lead head query key"]) -> Float[Tensor, "*lead head query key_and_sink"]:
        """The scores and, last, that of the sink, where there is one."""
        scores = working(scores)
        if self.sinks is None:
            return scores
        return torch.cat([scores, self.sinks.to(scores).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)

    def real(self, columns: Float[Tensor, "*lead head query key_and_sink"]) -> Float[Tensor, "*lead head query key"]:
        """Without the sink's column."""
        return columns if self.sinks is None else columns[..., :-1]

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        return self.real(masked_softmax(self.with_sink(inputs[0])))


class SoftmaxRule(Rule):
    """Base of the rules for the softmax of attention."""


class SoftmaxTemperature(SoftmaxRule):
    """The gradient of softmax(x / T) without the factor 1/T; the forward stays at T = 1 (GIM, arXiv 2505.17630, as described there)."""

    def __init__(self, temperature: float = 2.0) -> None:
        self.temperature = temperature

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        assert isinstance(op, Softmax)
        scores = op.with_sink(inputs[0])
        return (op.real(masked_softmax(torch.where(is_masked(scores), float("-inf"), scores / self.temperature))),)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        flat, g = kept[0], working(upstream)
        return (flat * (g - (flat * g).sum(-1, keepdim=True)),)


class SoftmaxIdentity(SoftmaxRule):
    """Each score gets the relevance of its entry of the pattern (Chefer et al. 2021). A score of exactly 0 can hold none.

    Source: Chefer et al. 2021, arXiv 2012.09838.
    """

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        scores, pattern = working(inputs[0]), working(output)
        masked = is_masked(scores)
        return (ratio(pattern.masked_fill(masked, 0.0), scores.masked_fill(masked, 0.0)),)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        return (working(upstream) * kept[0],)


class PairSoftmax(SoftmaxRule):
    """The softmax between two runs, exact and shift-invariant; the softmax's own Jacobian where they are equal (derived here).

    Source: derived here (docs/derivation.md); we know of no earlier use.
    """

    needs_reference = True

    @property
    def is_exact(self) -> bool:
        return True

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        assert reference is not None
        assert isinstance(op, Softmax)
        return (logarithmic_mean(op.with_sink(inputs[0]), op.with_sink(reference.inputs[0])),)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, Softmax)
        if op.sinks is not None:  # nothing is read at the sink
            upstream = torch.nn.functional.pad(upstream, (0, 1))
        return (op.real(pull_back(kept[0], working(upstream))),)

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        return nothing_kept(upstream)


def masked_softmax(scores: Tensor) -> Tensor:
    """Softmax in which a row with every entry masked (-inf) gives 0, not NaN."""
    dead = torch.isneginf(scores).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def is_masked(scores: Tensor) -> Tensor:
    """True where a score was masked: -inf, or finfo.min and what a mask of finfo.min added to a score makes of it."""
    return scores <= torch.finfo(scores.dtype).min / 2


def logarithmic_mean(s1: Tensor, s2: Tensor) -> Tensor:
    """l_i = (p1_i - p2_i) / (log p1_i - log p2_i) of p = softmax(s), stable; p_i where the two are equal; 0 where masked in both.

    Written as max(p1, p2) (1 - exp(-|d|)) / |d| with d from the scores themselves, so that it stays right where probabilities underflow.
    """
    both = is_masked(s1) & is_masked(s2)
    log_p1, log_p2 = (torch.log_softmax(s, -1) for s in (s1, s2))
    gap = (log_p1 - log_p2).abs()
    zero = both | ~(gap > 0)  # also where -inf - -inf gave NaN
    gap = torch.where(zero, torch.ones_like(gap), gap)
    mean = torch.maximum(log_p1, log_p2).exp() * torch.where(zero, torch.ones_like(gap), -torch.expm1(-gap) / gap)
    return mean.masked_fill(both, 0.0).nan_to_num(0.0)  # NaN is left only in rows with every entry masked


def pull_back(l: Tensor, upstream: Tensor) -> Tensor:  # noqa: E741
    """ds_i = l_i (g_i - sum_j l_j g_j / sum_k l_k): the transpose of the pair softmax, which is symmetric."""
    total = l.sum(-1, keepdim=True)
    mean = (l * upstream).sum(-1, keepdim=True) / torch.where(total > 0, total, torch.ones_like(total))
    return l * (upstream - mean)
