"""LNRule, PairNorm and PairLN against dense matrices, whole and in two steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from lens_relevance import RelevanceError
from lens_relevance.rules import LNRule, Norm, NormDivide, NormScale, NormWeight, PairLN, PairNorm, Reference, Rule, ZeroRule
from tests.rules.dense import DTYPES, FP64, SEEDS, back, matrix, near, normal, remainder, sink

N = 7
EPS = 1e-3
KINDS = {
    "layer_norm": dict(centred=True),
    "rms_norm": dict(centred=False),
    "gemma_rms_norm": dict(centred=False, offset=1.0),
    "layer_norm_pre": dict(centred=True, weight=None, bias=None),
    "rms_norm_pre": dict(centred=False, weight=None, bias=None),
}


def norm_of(kind: str, n: int = N, eps: float = EPS) -> Norm:
    settings = dict(weight=1 + 0.3 * normal(n, seed=11), bias=normal(n, seed=12)) | KINDS[kind]
    if not settings["centred"]:
        settings["bias"] = None
    return Norm(eps=eps, **settings)  # type: ignore[arg-type]


def weights(norm: Norm, n: int = N) -> Tensor:
    return torch.diag((norm.weight if norm.weight is not None else torch.ones(n, dtype=FP64)) + norm.offset)


def centring(norm: Norm, n: int = N) -> Tensor:
    return torch.eye(n, dtype=FP64) - (1 / n if norm.centred else 0.0)


def std(norm: Norm, x: Tensor) -> Tensor:
    c = centring(norm, x.shape[-1]) @ x
    return ((c @ c) / len(c) + norm.eps).sqrt()


@pytest.fixture(params=list(KINDS))
def norm(request: pytest.FixtureRequest) -> Norm:
    return norm_of(request.param)


X1, X2 = normal(1, N, seed=1) + 0.7, normal(1, N, seed=2) * 1.5 - 0.4


def pair_matrix(norm: Norm, x1: Tensor, x2: Tensor, constant_scale: bool) -> Tensor:
    """w [mean(r) C + mean(c) (dr/dx)^T], dr/dx = -(c1 + c2)^T C / (n s1 s2 (s1 + s2)), written out as a matrix."""
    c, s1, s2 = centring(norm), std(norm, x1), std(norm, x2)
    c1, c2 = c @ x1, c @ x2
    dense = (1 / s1 + 1 / s2) / 2 * c
    if not constant_scale:
        dense = dense - torch.outer((c1 + c2) / 2, c.T @ (c1 + c2)) / (len(c1) * s1 * s2 * (s1 + s2))
    return weights(norm) @ dense


def test_ln_rule_is_the_norm_with_a_constant_standard_deviation(norm: Norm) -> None:
    near(matrix(LNRule(), norm, (X1,)), weights(norm) @ centring(norm) / std(norm, X1[0]))


def test_ln_rule_differs_from_the_gradient(norm: Norm) -> None:
    gradient = torch.autograd.functional.jacobian(norm, X1).squeeze()
    assert (matrix(LNRule(), norm, (X1,)) - gradient).abs().max() > 0.1


@pytest.mark.parametrize("rule", [PairNorm(), PairLN()], ids=["pair", "pair_ln"])
def test_pair_forms(norm: Norm, rule: PairNorm) -> None:
    near(matrix(rule, norm, (X1,), (X2,)), pair_matrix(norm, X1[0], X2[0], rule.constant_scale))


def test_pair_norm_is_exact(norm: Norm) -> None:
    near(matrix(PairNorm(), norm, (X1,), (X2,)) @ (X1 - X2)[0], (norm(X1) - norm(X2))[0])


def test_pair_ln_is_not_exact_and_its_sink_says_by_how_much(norm: Norm) -> None:
    kept = sink(PairLN(), norm, (X1,), X2, (X2,))
    assert kept.abs().item() > 1e-2
    near(kept, remainder(PairLN(), norm, (X1,), X2, (X2,)))


def test_pair_forms_are_symmetric_in_the_runs(norm: Norm) -> None:
    for rule in (PairNorm(), PairLN()):
        near(matrix(rule, norm, (X1,), (X2,)), matrix(rule, norm, (X2,), (X1,)))


def test_equal_runs_give_the_gradient_and_the_ln_rule(norm: Norm) -> None:
    near(matrix(PairNorm(), norm, (X1,), (X1,)), torch.autograd.functional.jacobian(norm, X1).squeeze())
    near(matrix(PairLN(), norm, (X1,), (X1,)), matrix(LNRule(), norm, (X1,)))


@pytest.mark.parametrize("rule", [LNRule(), PairNorm(), PairLN(), Rule()], ids=["ln", "pair", "pair_ln", "gradient"])
def test_sinks_equal_what_is_left(norm: Norm, rule: Rule) -> None:
    x1, x2, g = normal(3, 4, N, seed=1), normal(3, 4, N, seed=2), normal(3, 4, N, seed=3)
    for other in (None, (x2,)):
        if rule.needs_reference and other is None:
            continue
        if type(rule) is Rule:
            leaf = x1.clone().requires_grad_(True)
            (plain,) = torch.autograd.grad(norm(leaf), leaf, g)
            y = norm(x1) - (norm(x2) if other else 0)
            expected = (y * g - (x1 - (x2 if other else 0)) * plain).flatten(1).sum(1)
        else:
            expected = remainder(rule, norm, (x1,), g, other)
        assert torch.allclose(sink(rule, norm, (x1,), g, other), expected, atol=1e-11)


def test_ln_rule_conserves_all_but_the_bias() -> None:
    norm = norm_of("layer_norm")
    kept = sink(LNRule(), norm, (X1,), X2)
    assert norm.bias is not None
    near(kept, (norm.bias * X2[0]).sum().reshape(1))
    norm.bias = None
    assert remainder(LNRule(), norm, (X1,), X2).abs() < 1e-12
    leaf = X1.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(norm(leaf), leaf, X2)
    assert abs(float((gradient * X1).sum())) < 0.1 * abs(float((norm(X1) * X2).sum()))  # the gradient lets almost nothing through


@pytest.mark.parametrize("rule", [LNRule(), PairNorm(), PairLN()], ids=["ln", "pair", "pair_ln"])
def test_steps_compose_to_the_whole(norm: Norm, rule: Rule) -> None:
    """weight, then division, then scale, with the scale's coefficient carried on, is the whole rule."""
    steps = NormWeight(norm), NormDivide(norm), NormScale(norm)
    runs = [(x, norm.scale(x)) for x in (X1, X2)]
    g = normal(1, N, seed=5)
    whole = back(rule, norm, (X1,), g, (X2,))[0]
    normalized = norm.weighted(g)
    references = [Reference((runs[1][0], runs[1][1]), steps[1](*runs[1])), Reference((X2,), runs[1][1])]
    divide = rule.backward(steps[1], rule.keep(steps[1], runs[0], steps[1](*runs[0]), references[0]), normalized)
    assert divide[0] is not None and divide[1] is not None
    scale = rule.backward(steps[2], rule.keep(steps[2], (X1,), runs[0][1], references[1]), divide[1])[0]
    near(divide[0] + (0 if scale is None else scale), whole)  # type: ignore[arg-type]
    if isinstance(rule, PairNorm) and not rule.constant_scale:
        assert scale is not None and scale.abs().max() > 1e-2


def test_steps_of_the_pair_norm_are_exact_one_by_one(norm: Norm) -> None:
    s1, s2 = norm.scale(X1), norm.scale(X2)
    near(matrix(PairNorm(), NormScale(norm), (X1,), (X2,)) @ (X1 - X2)[0], (s1 - s2)[0])
    divide, g = NormDivide(norm), normal(1, N, seed=5)
    c = centring(norm)
    to_x, to_scale = back(PairNorm(), divide, (X1, s1), g, (X2, s2))
    near(to_x, g @ c * (1 / s1 + 1 / s2) / 2)  # type: ignore[arg-type]
    near(to_scale, -(g @ (c @ (X1 + X2)[0] / 2)).reshape(1, 1) / (s1 * s2))  # type: ignore[arg-type]
    near(
        (to_x * (X1 - X2)).sum(-1) + (to_scale * (s1 - s2)).sum(-1),  # type: ignore[operator]
        ((divide(X1, s1) - divide(X2, s2)) * g).sum(-1),
    )


def test_the_weight_step_keeps_the_bias_alone() -> None:
    step = NormWeight(norm_of("layer_norm"))
    near(sink(ZeroRule(), step, (X1,), X2), (step.bias * X2[0]).sum().reshape(1))  # type: ignore[operator]
    assert sink(ZeroRule(), step, (X1,), X2, (X2,)).item() == 0


@settings(max_examples=60, deadline=None)
@given(
    seed=SEEDS,
    dtype=DTYPES,
    kind=st.sampled_from(list(KINDS)),
    n=st.integers(2, 33),
    batch=st.integers(1, 3),
    scale=st.sampled_from([1e-2, 1.0, 1e3]),
    closeness=st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 1.0]),
)
def test_pair_norm_is_exact_whatever_it_meets(
    seed: int, dtype: torch.dtype, kind: str, n: int, batch: int, scale: float, closeness: float
) -> None:
    norm = norm_of(kind, n)
    x1 = normal(batch, 3, n, seed=seed, dtype=dtype, scale=scale)
    x2 = (x1 + closeness * normal(batch, 3, n, seed=seed + 1, dtype=dtype, scale=scale)).to(dtype)
    g = normal(batch, 3, n, seed=seed + 2, dtype=dtype)
    try:
        (coefficient,) = back(PairNorm(), norm, (x1,), g, (x2,))
    except RelevanceError:  # one of the two happens to be flat
        reject()
    assert coefficient is not None and bool(torch.isfinite(coefficient).all())
    wide1, wide2 = (x.to(FP64) for x in (x1, x2))
    got = ((wide1 - wide2) * coefficient.to(FP64)).sum(-1)
    want = ((norm(wide1) - norm(wide2)) * g.to(FP64)).sum(-1)
    weighted, gap = norm.weighted(g.to(FP64)).abs(), (wide1 - wide2).abs()
    terms = weighted.sum(-1) * gap.sum(-1) / torch.minimum(norm.scale(wide1), norm.scale(wide2)).squeeze(-1)  # what cancels in the sums
    outputs = (weighted * (norm(wide1).abs() + norm(wide2).abs())).sum(-1)  # whose own difference is rounded where the runs nearly agree
    assert bool(((got - want).abs() <= (1e-13 if dtype == FP64 else 2e-6) * terms + 1e-14 * outputs).all())


@pytest.mark.parametrize("constant", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constant_activations_give_finite_coefficients(norm: Norm, constant: float, dtype: torch.dtype) -> None:
    flat, g = torch.full((1, N), constant, dtype=dtype), normal(1, N, seed=3, dtype=dtype)
    for first, second in ((flat, flat), (flat, X2.to(dtype)), (X1.to(dtype), flat)):
        for rule in (LNRule(), PairNorm(), PairLN()):
            (coefficient,) = back(rule, norm, (first,), g, (second,))
            assert coefficient is not None and bool(torch.isfinite(coefficient).all())


def quotient_matrix(norm: Norm, x1: Tensor, x2: Tensor, constant_scale: bool) -> Tensor:
    """c = y s as a product: w [C - mean(y) (ds/dx)^T] / mean(s), ds/dx = (c1 + c2)^T C / (n (s1 + s2))."""
    c, s1, s2 = centring(norm), std(norm, x1), std(norm, x2)
    c1, c2 = c @ x1, c @ x2
    dense = c.clone()
    if not constant_scale:
        dense = dense - torch.outer((c1 / s1 + c2 / s2) / 2, c.T @ (c1 + c2)) / (len(c1) * (s1 + s2))
    return weights(norm) @ (2 * dense / (s1 + s2))


def of_variance(norm: Norm, variance: float) -> Tensor:
    """A centred vector whose mean square is this."""
    c = centring(norm) @ X2[0]
    return (c * (variance / c.pow(2).mean()).sqrt()).unsqueeze(0)


@pytest.mark.parametrize("rule", [PairNorm(), PairLN()], ids=["pair", "pair_ln"])
@pytest.mark.parametrize("variance", [0.0, 1e-3, 0.1, 9.9, 10.1, 100.0])
@pytest.mark.parametrize("flat_first", [False, True])
def test_a_flat_run_is_split_as_a_quotient(norm: Norm, rule: PairNorm, variance: float, flat_first: bool) -> None:
    """Up to a variance of 10 eps; exact on either side, and bounded by what the wide run alone would give."""
    flat, wide = of_variance(norm, variance * norm.eps), 1000 * of_variance(norm, 10 * norm.eps)
    x1, x2 = (flat, wide) if flat_first else (wide, flat)
    got = matrix(rule, norm, (x1,), (x2,))
    dense = quotient_matrix if variance < 10 else pair_matrix
    near(got, dense(norm, x1[0], x2[0], rule.constant_scale), 1e-9)
    if not rule.constant_scale:
        change = (norm(x1) - norm(x2))[0]
        near(got @ (x1 - x2)[0], change, 1e-9)
    largest = float(got.norm() * norm.scale(wide))
    assert largest < 20 if variance < 10 else largest > 100


@pytest.mark.parametrize("ratio", [2.9, 3.1])
def test_runs_that_are_both_nearly_flat_are_split_as_a_product(norm: Norm, ratio: float) -> None:
    """Up to three times as wide."""
    flat = of_variance(norm, 0.5 * norm.eps)
    other = of_variance(norm, norm.eps * (1.5 * ratio**2 - 1))
    dense = pair_matrix if ratio < 3 else quotient_matrix
    near(matrix(PairNorm(), norm, (other,), (flat,)), dense(norm, other[0], flat[0], False), 1e-9)


def test_a_flat_run_is_right_in_float32(norm: Norm) -> None:
    """The product form is off by a thousandth of the change here, because what is large in it cancels."""
    flat, wide = of_variance(norm, 0.01 * norm.eps), 10**6 * of_variance(norm, 0.5 * norm.eps)
    g = normal(1, N, seed=3)
    exact, single = (
        back(
            PairNorm(),
            norm.__class__(
                None if norm.weight is None else norm.weight.to(d),
                None if norm.bias is None else norm.bias.to(d),
                norm.eps,
                centred=norm.centred,
                offset=norm.offset,
            ),
            (wide.to(d),),
            g.to(d),
            (flat.to(d),),
        )[0]
        for d in (torch.float64, torch.float32)
    )  # type: ignore[index]
    assert exact is not None and single is not None
    relevance, in_single = ((wide - flat) * c.double() for c in (exact, single))
    assert float((in_single - relevance).abs().sum() / relevance.abs().sum()) < 1e-5
    assert float(in_single.sum() - (norm(wide) - norm(flat)).mul(g).sum()) == pytest.approx(0, abs=1e-5 * float(relevance.abs().sum()))


@pytest.mark.parametrize("rule", [LNRule(), PairNorm(), PairLN()], ids=["ln", "pair", "pair_ln"])
def test_backward_broadcasts_over_leading_dimensions(norm: Norm, rule: Rule) -> None:
    x1, x2, g = normal(2, 3, N, seed=1), normal(2, 3, N, seed=2), normal(5, 2, 3, N, seed=3)
    kept = rule.keep(norm, (x1,), norm(x1), Reference((x2,), norm(x2)))
    many = rule.backward(norm, kept, g)[0]
    one_by_one = torch.stack([rule.backward(norm, kept, each)[0] for each in g])  # type: ignore[misc]
    near(many, one_by_one)  # type: ignore[arg-type]


def test_bf16_is_computed_in_fp32(norm: Norm) -> None:
    x1, x2, g = (normal(2, N, seed=i, dtype=torch.bfloat16) for i in (1, 2, 3))
    for rule in (LNRule(), PairNorm(), PairLN()):
        (half,) = back(rule, norm, (x1,), g, (x2,))
        (full,) = back(rule, norm, (x1.float(),), g.float(), (x2.float(),))
        assert half is not None and full is not None and half.dtype == torch.float32
        near(half, full, 1e-6)
