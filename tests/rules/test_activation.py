"""Identity, Rescale and gated activations against their factors written out, with kinks, zeros and near-equal runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from lens_relevance.rules import (
    Activation,
    ConstantFirstFactor,
    ElementwiseRule,
    GatedActivation,
    GatedRule,
    Half,
    Identity,
    PairProduct,
    ProductRule,
    Reference,
    Rescale,
    Rule,
    Scale,
    SoftCap,
)
from tests.rules.dense import DTYPES, FP64, SEEDS, back, near, normal, remainder, sink

Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "squared_relu": lambda x: F.relu(x).square(),
}
SLOPES_AT_ZERO = {"relu": 0.0, "silu": 0.5, "gelu": 0.5, "gelu_tanh": 0.5, "tanh": 1.0, "squared_relu": 0.0}


def exact(name: str, x: float) -> float:
    """f(x) without torch."""
    return {
        "relu": lambda: max(x, 0.0),
        "silu": lambda: x / (1 + math.exp(-x)),
        "gelu": lambda: x / 2 * math.erfc(-x / math.sqrt(2)),
        "gelu_tanh": lambda: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "tanh": lambda: math.tanh(x),
        "squared_relu": lambda: max(x, 0.0) ** 2,
    }[name]()


@pytest.fixture(params=list(FUNCTIONS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def factor(rule: Rule, operation: Activation, x: Tensor, other: Tensor | None = None) -> Tensor:
    """What the rule multiplies by, element by element."""
    (coefficient,) = back(rule, operation, (x,), torch.ones_like(x), None if other is None else (other,))
    assert coefficient is not None
    return coefficient


X1 = torch.tensor([[-3.0, -0.7, -1e-3, 0.4, 1.0, 2.5]], dtype=FP64)
X2 = torch.tensor([[2.0, -0.2, 1.3, -0.9, 1.7, -4.0]], dtype=FP64)


def test_identity_is_f_over_x(name: str) -> None:
    expected = torch.tensor([[exact(name, v) / v for v in X1[0].tolist()]], dtype=FP64)
    near(factor(Identity(), Activation(FUNCTIONS[name]), X1), expected)


def test_identity_at_zero_is_the_slope(name: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = factor(Identity(), Activation(FUNCTIONS[name]), torch.tensor([[0.0, -0.0]], dtype=dtype))
        assert got.flatten().tolist() == [SLOPES_AT_ZERO[name]] * 2


def test_identity_is_continuous_at_zero(name: str) -> None:
    """No stabiliser: the quotient is as good at 1e-12 as at 1."""
    got = factor(Identity(), Activation(FUNCTIONS[name]), torch.tensor([[1e-12, -1e-12]], dtype=FP64))
    slopes = {"relu": [1.0, 0.0]}.get(name, [SLOPES_AT_ZERO[name]] * 2)
    assert torch.allclose(got, torch.tensor([slopes], dtype=FP64), atol=1e-9)


def test_identity_conserves_and_the_gradient_does_not(name: str) -> None:
    operation, g = Activation(FUNCTIONS[name]), normal(1, 6, seed=4)
    assert remainder(Identity(), operation, (X1,), g).abs() < 1e-14
    assert sink(Identity(), operation, (X1,), g).item() == 0
    leaf = X1.clone().requires_grad_(True)
    y = operation(leaf)
    (gradient,) = torch.autograd.grad(y, leaf, g)
    left = (y.detach() * g - X1 * gradient).sum()
    assert torch.allclose(sink(Rule(), operation, (X1,), g), left.reshape(1))
    assert (left.abs() > 1e-2) == (name != "relu")  # a ReLU is linear on each side


def test_identity_between_two_runs_is_not_exact_and_says_so(name: str) -> None:
    operation, g = Activation(FUNCTIONS[name]), normal(1, 6, seed=4)
    kept = sink(Identity(), operation, (X1,), g, (X2,))
    assert kept.abs() > 1e-2
    near(kept, remainder(Identity(), operation, (X1,), g, (X2,)))


def test_rescale_is_the_difference_quotient(name: str) -> None:
    values = [(exact(name, a) - exact(name, b)) / (a - b) for a, b in zip(X1[0].tolist(), X2[0].tolist(), strict=True)]
    near(factor(Rescale(), Activation(FUNCTIONS[name]), X1, X2), torch.tensor([values], dtype=FP64))
    near(factor(Rescale(), Activation(FUNCTIONS[name]), X2, X1), torch.tensor([values], dtype=FP64))
    assert sink(Rescale(), Activation(FUNCTIONS[name]), (X1,), X2, (X2,)).item() == 0


@pytest.mark.parametrize("gap", [0.0, 1e-16, 1e-13, 1e-10, 1e-8])
def test_rescale_of_near_equal_runs_is_the_slope(name: str, gap: float) -> None:
    leaf = X1.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(FUNCTIONS[name](leaf).sum(), leaf)
    near(factor(Rescale(), Activation(FUNCTIONS[name]), X1 + gap, X1), slope, 1e-7 if gap == 1e-8 else 1e-9)


@pytest.mark.parametrize("gap", [1e-7, 2e-7])
def test_rescale_of_near_equal_runs_has_the_slope_in_the_middle(gap: float) -> None:
    """(x^3 - y^3) / (x - y) is x^2 + x y + y^2: the quotient itself would be off by 1e-9, the slope at one end by the gap."""
    x, y = X1 + gap, X1
    near(factor(Rescale(), Activation(lambda z: z**3), x, y), x**2 + x * y + y**2, 1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-8, 1e-4, 1e-3])
def test_rescale_of_near_equal_runs_in_fp32(name: str, gap: float) -> None:
    leaf = (X1 + gap / 2).requires_grad_(True)
    (slope,) = torch.autograd.grad(FUNCTIONS[name](leaf).sum(), leaf)
    near(factor(Rescale(), Activation(FUNCTIONS[name]), (X1 + gap).float(), X1.float()).double(), slope, 2e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-20, 1e-9, 1.0, 1e9])
def test_rescale_at_the_kink_of_a_relu(dtype: torch.dtype, size: float) -> None:
    """However near the kink: a third of the way is above it, so a third is the answer; no midpoint derivative."""
    x1, x2 = (torch.tensor([[v * size]], dtype=dtype) for v in (1.0, -2.0))
    got = factor(Rescale(), Activation(F.relu), x1, x2)
    assert torch.allclose(got.double(), torch.tensor([[1 / 3]], dtype=FP64), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 4.8e-3, 1e-4, 3e-6])
def test_rescale_at_a_clamp_away_from_zero(dtype: torch.dtype, gap: float) -> None:
    """The clamp lies a quarter of the way below the upper value: what is clamped off is attributed to nobody, the rest to the input."""
    x1, x2 = (torch.tensor([[7 + part * gap, -7 - part * gap]], dtype=dtype) for part in (0.25, -0.75))
    operation = Activation(lambda x: x.clamp(-7, 7))
    got, change = factor(Rescale(), operation, x1, x2) * (x1 - x2), operation(x1) - operation(x2)
    assert float(change.abs().min()) > 0.7 * gap  # three quarters, as far as the dtype can tell
    assert float((got - change).abs().max()) <= 32 * torch.finfo(dtype).eps * 7
    assert factor(Rescale(), operation, x1[:, :1], x1[:, :1]).item() == 0 and factor(Rescale(), operation, x2, x2).tolist() == [[1, 1]]


def test_rescale_where_a_saturated_relu_has_gradient_zero() -> None:
    """The run is switched off (gradient exactly 0), the reference on: the whole effect is found."""
    operation, off, on = Activation(F.relu), torch.tensor([[-1.0]], dtype=FP64), torch.tensor([[3.0]], dtype=FP64)
    leaf = off.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(operation(leaf).sum(), leaf)
    assert gradient.item() == 0 and factor(Identity(), operation, off).item() == 0
    effect = (off - on) * factor(Rescale(), operation, off, on)
    assert effect.item() == -3.0 == (operation(off) - operation(on)).item()


def test_soft_cap_is_passed_by_identity_and_rescale() -> None:
    operation, c = SoftCap(2.0), 2.0
    near(operation(X1), torch.tensor([[c * math.tanh(v / c) for v in X1[0].tolist()]], dtype=FP64))
    near(factor(Identity(), operation, X1), torch.tensor([[c * math.tanh(v / c) / v for v in X1[0].tolist()]], dtype=FP64))
    near(factor(Rescale(), operation, X1, X2) * (X1 - X2), operation(X1) - operation(X2))


@settings(max_examples=80, deadline=None)
@given(
    seed=SEEDS,
    dtype=DTYPES,
    name=st.sampled_from(list(FUNCTIONS)),
    scale=st.sampled_from([1e-6, 1.0, 30.0]),
    closeness=st.sampled_from([0.0, 1e-14, 1e-9, 1e-6, 1e-3, 1.0]),
    zeros=st.booleans(),
)
def test_rescale_is_exact_whatever_it_meets(seed: int, dtype: torch.dtype, name: str, scale: float, closeness: float, zeros: bool) -> None:
    x1 = normal(2, 3, 9, seed=seed, dtype=dtype, scale=scale)
    x2 = (x1 + closeness * normal(2, 3, 9, seed=seed + 1, dtype=dtype, scale=scale)).to(dtype)
    if zeros:
        x1[..., :3], x2[..., 2:5] = 0, 0
    got = factor(Rescale(), Activation(FUNCTIONS[name]), x1, x2)
    assert bool(torch.isfinite(got).all())
    wide1, wide2 = x1.to(FP64), x2.to(FP64)
    error = (got.to(FP64) * (wide1 - wide2) - (FUNCTIONS[name](wide1) - FUNCTIONS[name](wide2))).abs()
    eps = torch.finfo(FP64 if dtype == FP64 else torch.float32).eps  # f itself is rounded to about eps |x|
    slack = 4 * eps * sum(x.abs() for x in (wide1, wide2, FUNCTIONS[name](wide1), FUNCTIONS[name](wide2)))
    if dtype != FP64:  # near-equal runs get the midpoint's slope, an error of the third order in a difference of 2e-3
        slack = slack + 1e-5 * (wide1 - wide2).abs()
    assert bool((error <= slack).all())


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, dtype=DTYPES, name=st.sampled_from(list(FUNCTIONS)), scale=st.sampled_from([1e-20, 1e-6, 1.0, 30.0]))
def test_identity_conserves_whatever_it_meets(seed: int, dtype: torch.dtype, name: str, scale: float) -> None:
    x = normal(2, 3, 9, seed=seed, dtype=dtype, scale=scale)
    x[..., 0] = 0
    got = factor(Identity(), Activation(FUNCTIONS[name]), x)
    wide = x.to(FP64)
    y = FUNCTIONS[name](wide)
    assert bool(torch.isfinite(got).all())
    slack = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert bool(((got.to(FP64) * wide - y).abs() <= slack * y.abs() + 0.1 * slack * wide.abs()).all())


# Gated MLPs: y = f(gate) * up.

ACTIVATIONS: dict[str, ElementwiseRule] = {"gradient": Scale(1.0), "identity": Identity(), "rescale": Rescale()}
PRODUCTS: dict[str, ProductRule] = {"gradient": Scale(1.0), "half": Half, "constant": ConstantFirstFactor(), "pair": PairProduct()}


def gated(activation: str, product: str) -> GatedRule:
    return GatedRule(ACTIVATIONS[activation], PRODUCTS[product])


GATE1, UP1, GATE2, UP2, G = (normal(3, 5, seed=i) for i in range(5))


def slope(activation: str, f: str, g1: Tensor, g2: Tensor) -> Tensor:
    """The factor of the activation alone, from its definition."""
    if activation == "gradient":
        h = 1e-6
        return (FUNCTIONS[f](g1 + h) - FUNCTIONS[f](g1 - h)) / (2 * h)
    return FUNCTIONS[f](g1) / g1 if activation == "identity" else (FUNCTIONS[f](g1) - FUNCTIONS[f](g2)) / (g1 - g2)


@pytest.mark.parametrize("f", ["silu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(
    "activation, product", list(itertools.product(["gradient", "identity", "rescale"], ["gradient", "half", "constant", "pair"]))
)
def test_gated_in_every_combination(activation: str, product: str, f: str) -> None:
    rule, operation = gated(activation, product), GatedActivation(FUNCTIONS[f])
    to_gate, to_up = back(rule, operation, (GATE1, UP1), G, (GATE2, UP2))
    act1, act2, passed = FUNCTIONS[f](GATE1), FUNCTIONS[f](GATE2), slope(activation, f, GATE1, GATE2)
    gate, up = {
        "gradient": (passed * UP1, act1),
        "half": (passed * UP1 / 2, act1 / 2),
        "constant": (torch.zeros_like(passed), act1),
        "pair": (passed * (UP1 + UP2) / 2, (act1 + act2) / 2),
    }[product]
    assert to_gate is not None and to_up is not None
    assert torch.allclose(to_gate, G * gate, atol=1e-8 if activation == "gradient" else 1e-13)
    near(to_up, G * up)
    assert rule.needs_reference == (activation == "rescale" or product == "pair")
    for other in (None, (GATE2, UP2)):
        if other is None and rule.needs_reference:
            continue
        kept = sink(rule, operation, (GATE1, UP1), G, other)
        assert torch.allclose(kept, remainder(rule, operation, (GATE1, UP1), G, other), atol=1e-12)
        conserves = product == "constant" or (product == "half" and activation == "identity")
        conserves |= product == "half" and activation == "gradient" and f == "relu"
        complete = activation == "rescale" and product == "pair"
        assert bool((kept.abs() < 1e-12).all()) == (conserves if other is None else complete)


def test_the_plain_gradient_of_a_gate_counts_twice() -> None:
    """With a function that is linear on each side, both factors claim the whole product: -R is left over."""
    operation = GatedActivation(F.relu)
    kept = sink(gated("gradient", "gradient"), operation, (GATE1, UP1), G)
    near(kept, -(operation(GATE1, UP1) * G).sum(-1))


def test_gated_equal_runs_give_the_gradient() -> None:
    operation = GatedActivation(F.silu)
    leaves = [GATE1.clone().requires_grad_(True), UP1.clone().requires_grad_(True)]
    expected = torch.autograd.grad(operation(*leaves), leaves, G)
    for got, want in zip(back(gated("rescale", "pair"), operation, (GATE1, UP1), G, (GATE1, UP1)), expected, strict=True):
        assert got is not None
        near(got, want, 1e-9)


def test_gated_is_symmetric_in_the_runs() -> None:
    operation, rule = GatedActivation(F.gelu), gated("rescale", "pair")
    one = back(rule, operation, (GATE1, UP1), G, (GATE2, UP2))
    two = back(rule, operation, (GATE2, UP2), G, (GATE1, UP1))
    for a, b in zip(one, two, strict=True):
        assert a is not None and b is not None
        near(a, b)


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    dtype=DTYPES,
    activation=st.sampled_from(["gradient", "identity", "rescale"]),
    product=st.sampled_from(["gradient", "half", "constant", "pair"]),
    scale=st.sampled_from([1e-4, 1.0, 50.0]),
    zeros=st.booleans(),
)
def test_gated_stays_finite_and_pairs_stay_exact(
    seed: int, dtype: torch.dtype, activation: str, product: str, scale: float, zeros: bool
) -> None:
    g1, u1, g2, u2, upstream = (normal(2, 4, 5, seed=seed + i, dtype=dtype, scale=scale) for i in range(5))
    if zeros:
        g1[..., 0], g2[..., :2], u1[..., 3] = 0, 0, 0
    operation, rule = GatedActivation(F.silu), gated(activation, product)
    coefficients = back(rule, operation, (g1, u1), upstream, (g2, u2))
    assert all(c is not None and bool(torch.isfinite(c).all()) for c in coefficients)
    if activation == "rescale" and product == "pair":
        wide = [x.to(FP64) for x in (g1, u1, g2, u2, upstream)]
        got = (wide[0] - wide[2]) * coefficients[0] + (wide[1] - wide[3]) * coefficients[1]  # type: ignore[operator]
        want = (operation(*wide[:2]) - operation(*wide[2:4])) * wide[4]
        size = (wide[4] * scale * scale).abs() * 20 + 1e-30
        assert bool(((got - want).abs() <= (1e-11 if dtype == FP64 else 1e-5) * size).all())


def test_backward_broadcasts_over_leading_dimensions() -> None:
    many = normal(4, 3, 5, seed=9)
    operation, reference = GatedActivation(F.silu), Reference((GATE2, UP2), torch.zeros_like(GATE2))
    for rule in (gated("identity", "half"), gated("rescale", "pair")):
        kept = rule.keep(operation, (GATE1, UP1), operation(GATE1, UP1), reference)
        for index in (0, 1):
            each = torch.stack([rule.backward(operation, kept, g)[index] for g in many])  # type: ignore[misc]
            near(rule.backward(operation, kept, many)[index], each)  # type: ignore[arg-type]
