"""Targets made definite: functions of the logits (or of a latent) of given tokens, and their exact coefficients between two runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.rules.softmax import logarithmic_mean

Logits = Float[Tensor, "batch pos d_vocab"]


class Metric:
    """A function from logits [batch, pos, d_vocab] to [batch] (or a scalar), for the tokens it was made for."""

    def __init__(self, function: Callable[[Any], Tensor]) -> None:
        self.function = function

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits)

    @property
    def at(self) -> Int[Tensor, "batch n"] | None:
        """The positions whose logits it reads; None: all."""
        return None

    def of_read(self) -> Metric:
        """The same as a function of the logits [batch, n, d_vocab] at these positions."""
        return self

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        """Coefficients at the logits that make (logits - reference) * coefficients sum to the difference of the metric.

        Here the gradient averaged over the straight path between the two logits (8-point Gauss-Legendre): exact for polynomials up to
        degree 15 and as near as quadrature comes for others; the audit shows what is left as the sink `target`. A gradient that is the
        same at both ends and makes the sum right is taken as it is: that of a metric linear in the logits.
        """
        gradient = gradient_at(self, logits)
        if torch.equal(gradient, gradient_at(self, reference)) and self._completed_by(gradient, logits, reference):
            return gradient
        nodes, weights = np.polynomial.legendre.leggauss(8)
        total = torch.zeros_like(logits)
        for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
            total += float(w) * gradient_at(self, reference + float(t) * (logits - reference))
        return total

    def _completed_by(self, gradient: Logits, logits: Logits, reference: Logits) -> bool:
        """Whether these coefficients account for the difference of the metric, up to rounding."""
        one, other = self(logits), self(reference)
        shares = ((logits - reference) * gradient).flatten(1)
        total, size = (shares.sum(1), shares.abs().sum(1)) if one.ndim else (shares.sum(), shares.abs().sum())
        rounding = 16 * torch.finfo(one.dtype).eps * (size.to(one.device) + one.abs() + other.abs())
        return bool(((total.to(one.device) - (one - other)).abs() <= rounding).all())


class AtPositions(Metric):
    """A metric of the logits [batch, n, d_vocab] at n positions of each row, as a function of the logits at all positions."""

    def __init__(self, at: Int[Tensor, "batch n"], metric: Metric) -> None:
        self._at, self.metric = at, metric

    @property
    def at(self) -> Int[Tensor, "batch n"]:
        return self._at

    def __call__(self, logits: Tensor) -> Tensor:
        return self.metric(read_at(logits, self.at))

    def of_read(self) -> Metric:
        return self.metric

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        coefficients = self.metric.pair_coefficients(read_at(logits, self.at), read_at(reference, self.at))
        index = self.at.to(logits.device).unsqueeze(2).expand_as(coefficients)
        return torch.zeros_like(logits).scatter_add(1, index, coefficients)


class LogitCombination(Metric):
    """mean of logits[answer] - mean of logits[wrong], at one position."""

    def __init__(self, answer: Int[Tensor, "batch n"], wrong: Int[Tensor, "batch m"] | None) -> None:
        self.answer, self.wrong = answer, wrong

    def __call__(self, logits: Float[Tensor, "batch 1 d_vocab"]) -> Float[Tensor, " batch"]:
        last = _upcast(logits[:, 0])
        value = last.gather(1, self.answer.to(last.device)).mean(1)
        return value if self.wrong is None else value - last.gather(1, self.wrong.to(last.device)).mean(1)

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        return gradient_at(self, logits)


class LogProbs(Metric):
    """Sum over n positions of log softmax(logits)[token]."""

    def __init__(self, tokens: Int[Tensor, "batch n"]) -> None:
        self.tokens = tokens

    def __call__(self, logits: Float[Tensor, "batch n d_vocab"]) -> Float[Tensor, " batch"]:
        return _upcast(logits).log_softmax(-1).gather(2, self.tokens.to(logits.device).unsqueeze(2)).sum((1, 2))

    def pair_coefficients(self, logits: Logits, reference: Logits) -> Logits:
        """The softmax pair form, exact: d log p_t = ds_t - sum_j l_j ds_j / sum_k l_k (derived here)."""
        weights = logarithmic_mean(_upcast(logits), _upcast(reference))
        onehot = torch.nn.functional.one_hot(self.tokens.to(logits.device), logits.shape[-1])
        return (onehot - weights / weights.sum(-1, keepdim=True)).to(logits.dtype)


def by_position(logits: Tensor) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits with an axis of positions; those of a classifier, [batch, class], are at one position."""
    return logits if logits.ndim > 2 else logits.unsqueeze(1)


def read_at(logits: Tensor, at: Int[Tensor, "batch n"]) -> Float[Tensor, "batch n d_vocab"]:
    """The logits at these positions; those of a classifier, [batch, class] or [batch, 1, class], are at one position, whatever the text."""
    logits = by_position(logits)
    at = at.to(logits.device) if logits.shape[1] > 1 else torch.zeros_like(at, device=logits.device)
    return logits[torch.arange(len(at), device=logits.device).unsqueeze(1), at]


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class LatentValue(Metric):
    """One activation at a HookPoint, in TransformerLens's layout: [batch, pos, d] or [batch, pos, head, d_head]."""

    def __init__(
        self, name: str, at: Int[Tensor, " batch"], head: int | None, *, unit: int | None, direction: Float[Tensor, " d"] | None
    ) -> None:
        self.name, self.position, self.head, self.unit, self.direction = name, at, head, unit, direction

    def __call__(self, activation: Tensor) -> Tensor:
        here = _upcast(activation[torch.arange(self.position.shape[0]), self.position.to(activation.device)])
        if self.head is not None:
            if here.ndim != 3 or not -here.shape[1] <= self.head < here.shape[1]:
                raise RelevanceError(f"latent: {self.name} has no head {self.head}; it is {list(activation.shape)}")
            here = here[:, self.head]
        here = here.flatten(1)
        if self.direction is not None:
            direction = self.direction.to(here)
            if direction.shape != here.shape[1:]:
                raise RelevanceError(f"latent: the direction has {list(direction.shape)} entries, {self.name} has {here.shape[1]}")
            return here @ direction
        if self.unit is None or not -here.shape[1] <= self.unit < here.shape[1]:
            raise RelevanceError(f"latent: give a unit from 0 to {here.shape[1] - 1} at {self.name}, or a direction; got unit={self.unit}")
        return here[:, self.unit]

    def pair_coefficients(self, logits: Tensor, reference: Tensor) -> Tensor:
        return gradient_at(self, logits)


def gradient_at(metric: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """d(sum of the metric over the batch) / d(logits)."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_(True)
        value = metric(leaf)
        if not value.requires_grad:
            raise RelevanceError("the target does not depend on the logits, so there is nothing to propagate")
        return torch.autograd.grad(value.sum(), leaf)[0]
