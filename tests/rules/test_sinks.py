"""Attention with a sink: a softmax over one more column, which has a score and no value (GPT-OSS)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_relevance.rules import ConstantOutput, PairSoftmax, Reference, Rule, Softmax, SoftmaxTemperature
from tests.rules.dense import near

SINKS = torch.tensor([0.7, -1.3], dtype=torch.float64)


def _scores(seed: int, masked: bool = True) -> Tensor:
    """[batch, head, query, key], causally masked."""
    scores = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), float("-inf")) if masked else scores


def _by_hand(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / (exponentials.sum(-1, keepdim=True) + SINKS.exp().reshape(1, 2, 1, 1))


def _back(rule: Rule, x: Tensor, g: Tensor, other: Tensor | None = None) -> Tensor:
    op = Softmax(SINKS)
    reference = None if other is None else Reference((other,), op(other))
    (c,) = rule.backward(op, rule.keep(op, (x,), op(x), reference), g)
    assert c is not None
    return c


def test_the_operation_leaves_a_share_to_the_sink() -> None:
    pattern = Softmax(SINKS)(_scores(0))
    near(pattern, _by_hand(_scores(0)))
    assert float(pattern.sum(-1).max()) < 1


def test_the_account_names_what_the_sink_keeps() -> None:
    """Under the plain gradient: R_A - R_s; what is held constant keeps all."""
    op, x, g = Softmax(SINKS), _scores(0, masked=False), _scores(1, masked=False)
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(_by_hand(leaf), leaf, g)
    near(Rule().sink(op, (x,), op(x), None, g), (_by_hand(x) * g - x * expected).sum((1, 2, 3)))
    near(ConstantOutput.sink(op, (x,), op(x), None, g), (_by_hand(x) * g).sum((1, 2, 3)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_temperature_reaches_the_sink_too(temperature: float) -> None:
    x, g = _scores(0, masked=False), _scores(1, masked=False)
    leaf = x.clone().requires_grad_(True)
    flat = torch.cat([leaf, SINKS.reshape(1, 2, 1, 1).expand(3, 2, 4, 1)], -1).div(temperature).softmax(-1)[..., :-1]
    (expected,) = torch.autograd.grad(flat, leaf, g)
    near(_back(SoftmaxTemperature(temperature), x, g), expected * temperature)


def test_the_pair_form_is_exact() -> None:
    one, two, g = _scores(0), _scores(2), _scores(1, masked=False)
    seen = one > float("-inf")
    change = (one - two).masked_fill(~seen, 0.0)
    near((change * _back(PairSoftmax(), one, g, two)).sum(-1), ((_by_hand(one) - _by_hand(two)) * g).sum(-1))
    # not shift-invariant: the sink's score stays where it is
    shift = torch.full_like(one, 0.5)
    near((shift * _back(PairSoftmax(), one + 0.5, g, one)).sum(-1), ((_by_hand(one + 0.5) - _by_hand(one)) * g).sum(-1))


def test_the_pair_form_of_a_run_with_itself_is_the_gradient() -> None:
    x, g = _scores(0, masked=False), _scores(1, masked=False)
    leaf = x.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(_by_hand(leaf), leaf, g)
    near(_back(PairSoftmax(), x, g, x.clone()), expected)
