"""The comparison of a model's gradient with that of the operation recomputed, by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lens_relevance.hooks.gradient_check import gradient_off_by
from lens_relevance.hooks.linear_steps import edge_of, keeps_gradients_whole
from lens_relevance.rules import Activation, Softmax
from lens_relevance.rules.base import Traced

W = torch.linspace(-1, 2, 8, dtype=torch.float64)


def leaf(*shape: int) -> Tensor:
    """What leaves a HookPoint; not a leaf of the graph, as no HookPoint's tensor is."""
    x = torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).exp().reshape(shape)
    return x.requires_grad_().view(shape)


def half(x: Tensor) -> Tensor:
    kept, cut = x.tensor_split(2, -1)
    return torch.cat([kept, cut.detach()], -1)


def test_what_is_lost_is_measured_in_the_size_of_what_is_expected() -> None:
    """y = x^3 with the second half cut off: J^T r = 3 x^2 r, of which 3 x^2 r in the second half is missing."""
    x, r = leaf(2, 3, 8), torch.arange(1.0, 49, dtype=torch.float64).cos().reshape(2, 3, 8)
    off = gradient_off_by(Traced(Activation(lambda x: x.pow(3)), [x]), half(x) ** 3, [x], r)
    gradient = 3 * x.detach() ** 2 * r
    natural = r.norm() * (x.detach() ** 3).norm() / x.detach().norm()
    assert natural < gradient.norm()
    assert off == pytest.approx(float(gradient[..., 4:].norm() / gradient.norm()), rel=1e-12) and off > 0.5


def test_a_function_of_next_to_no_slope_is_measured_in_its_natural_size() -> None:
    """y = 1 + x / 1000, with the second half cut off: r / 1000 is missing, against |r| |y| / |x|."""
    x, r = leaf(1, 1, 8), torch.ones(1, 1, 8, dtype=torch.float64)
    off = gradient_off_by(Traced(Activation(lambda x: 1 + x / 1000), [x]), 1 + half(x) / 1000, [x], r)
    natural = r.norm() * (1 + x.detach() / 1000).norm() / x.detach().norm()
    assert off == pytest.approx(float((r / 1000)[..., 4:].norm() / natural), rel=1e-12)


def test_a_softmax_that_attends_to_one_position_is_measured_in_its_weights() -> None:
    """J^T r = p (r - p . r), next to 0 where one weight is nearly 1, against |p r|; a masked score is no size."""
    scores = torch.tensor([[[[12.0, 3.0, 2.0, float("-inf")]]]], dtype=torch.float64).requires_grad_().view(1, 1, 1, 4)
    r = torch.tensor([[[[1.0, -1.0, 2.0, 5.0]]]], dtype=torch.float64)
    off = gradient_off_by(Traced(Softmax(), [scores]), half(scores).softmax(-1), [scores], r)
    p = scores.detach().softmax(-1)
    gradient = p * (r - (p * r).sum())
    assert off == pytest.approx(float(gradient[..., 2:].norm() / (p * r).norm()), rel=1e-9) and 1e-6 < off < 1e-3


def test_an_honest_gradient_is_off_by_nothing() -> None:
    x, r = leaf(2, 3, 8), torch.ones(2, 3, 8, dtype=torch.float64)
    assert gradient_off_by(Traced(Activation(lambda x: x.pow(3)), [x]), x * x * x + 0.0, [x], r) == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_said_of_values_that_are_not_finite(value: float) -> None:
    x = leaf(1, 2, 8).index_fill(1, torch.tensor([1]), value)
    assert gradient_off_by(Traced(Activation(lambda x: x.pow(3)), [x]), half(x) ** 3, [x], torch.ones(1, 2, 8, dtype=torch.float64)) is None


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "a matrix": lambda x: functional.linear(x, torch.outer(W, W), W),
    "a part of a joint matrix": lambda x: functional.linear(x, torch.cat([torch.outer(W, W)] * 3)).split(8, -1)[1],
    "an RMSNorm": lambda x: W * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()),
    "a LayerNorm in one step": lambda x: functional.layer_norm(x, (8,), W, W),
    "behind an empty cache": lambda x: torch.cat([torch.zeros(2, 0, 8, dtype=x.dtype), x], 1),
    "a gate": lambda x: functional.silu(x) * x,
    "a scale": lambda x: 0.5 * x,
    "a softmax": lambda x: x.softmax(-1),
    "a product of matrices": lambda x: x @ x.transpose(-1, -2),
}
NOT_WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "half of the columns": half,
    "a matrix on half of the columns": lambda x: functional.linear(half(x), torch.outer(W, W)),
    "behind earlier positions": lambda x: torch.cat([x.detach()[:, :1], x[:, 1:]], 1),
    "a part of the sum": lambda x: 0.5 * x + (0.5 * x).detach(),
    "a norm of a constant scale": lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt().detach(),
    "a norm of a constant direction": lambda x: x.detach() * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt(),
    "a constant slope": lambda x: x * x.sigmoid().detach(),
    "a product with a constant matrix of each example": lambda x: x @ x.detach().transpose(-1, -2),
    "one of two": lambda x: torch.where(W > 0, x, x.detach()),
}


@pytest.mark.parametrize("name", [*WHOLE, *NOT_WHOLE])
def test_steps_that_can_lose_a_part_are_told_from_those_that_cannot(name: str) -> None:
    x = leaf(2, 3, 8)
    assert keeps_gradients_whole(edge_of((WHOLE | NOT_WHOLE)[name](x)), {edge_of(x)}) is (name in WHOLE)
