"""The rules of scores, pattern and z against explicit sums over heads and positions: GQA, rotation, soft-caps, masks, saturation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lens_relevance.rules import (
    AttentionGeometry,
    CappedScoresRule,
    ConstantFirstFactor,
    ConstantOutput,
    Half,
    Identity,
    Mix,
    PairProduct,
    PairSoftmax,
    Reference,
    Rescale,
    Rule,
    Scale,
    Scores,
    Softmax,
    SoftmaxTemperature,
)
from lens_relevance.rules.base import share
from lens_relevance.rules.softmax import logarithmic_mean
from tests.rules.dense import DTYPES, FP64, SEEDS, back, near, normal, remainder, sink

BATCH, POS, HEADS, KEY_VALUE_HEADS, D_HEAD, SCALE = 2, 5, 4, 2, 4, 0.37
MIN = torch.finfo(FP64).min


def rotation(pos: int = POS, d_head: int = D_HEAD) -> Tensor:
    """One orthogonal matrix per position, turning the first half of each head's features against the second."""
    turned = torch.zeros(pos, d_head, d_head, dtype=FP64)
    half = d_head // 2
    for p in range(pos):
        for i in range(half):
            angle = p * (0.9 / (i + 1))
            turned[p, i, i] = turned[p, i + half, i + half] = math.cos(angle)
            turned[p, i, i + half], turned[p, i + half, i] = -math.sin(angle), math.sin(angle)
    return turned


def rotate(x: Tensor, sign: int, constants: tuple[Tensor, ...]) -> Tensor:
    matrix = rotation().to(x.dtype) if sign == 1 else rotation().to(x.dtype).transpose(-1, -2)
    return torch.einsum("pij,...pj->...pi", matrix, x)


def geometry(kv: int = KEY_VALUE_HEADS, cap: float | None = None, rotated: bool = False) -> AttentionGeometry:
    return AttentionGeometry(HEADS, kv, D_HEAD, scale=SCALE, soft_cap=cap, rotate=rotate if rotated else None)


def heads(x: Tensor, n: int) -> Tensor:
    """[batch, pos, n * d_head] -> [batch, pos, n, d_head]."""
    return x.reshape(*x.shape[:-1], n, D_HEAD)


def dense_scores(q: Tensor, k: Tensor, kv: int, rotated: bool) -> Tensor:
    """scale * (R_t q_t) . (R_s k_s), head by head."""
    q, k = heads(q, HEADS), heads(k, kv)
    if rotated:
        q, k = (torch.einsum("pij,bphj->bphi", rotation(), x) for x in (q, k))
    return torch.stack([SCALE * torch.einsum("btd,bsd->bts", q[:, :, h], k[:, :, h * kv // HEADS]) for h in range(HEADS)], 1)


def dense_back(g: Tensor, q: Tensor, k: Tensor, kv: int, rotated: bool) -> tuple[Tensor, Tensor]:
    """Coefficients at q and k of coefficients g at the raw scores, head by head: the other factor, turned back."""
    q, k = heads(q, HEADS), heads(k, kv)
    if rotated:
        q, k = (torch.einsum("pij,bphj->bphi", rotation(), x) for x in (q, k))
    to_q, to_k = torch.zeros_like(q), torch.zeros_like(k)
    for h in range(HEADS):
        to_q[:, :, h] += SCALE * torch.einsum("bts,bsd->btd", g[:, h], k[:, :, h * kv // HEADS])
        to_k[:, :, h * kv // HEADS] += SCALE * torch.einsum("bts,btd->bsd", g[:, h], q[:, :, h])
    if rotated:
        to_q, to_k = (torch.einsum("pji,bphj->bphi", rotation(), x) for x in (to_q, to_k))
    return to_q.flatten(2), to_k.flatten(2)


def queries_keys(kv: int, seed: int) -> tuple[Tensor, Tensor]:
    return normal(BATCH, POS, HEADS * D_HEAD, seed=seed), normal(BATCH, POS, kv * D_HEAD, seed=seed + 100)


def scores_like(seed: int) -> Tensor:
    return normal(BATCH, HEADS, POS, POS, seed=seed)


def rule_of(operation: Scores, product: Rule, cap: Rule) -> Rule:
    """The rule of scores as a ruleset makes it: of the product, and of the soft-cap where there is one."""
    return operation.compose({"scores": product, "soft_cap": cap} if operation.geometry.soft_cap else {"scores": product})


CASES = pytest.mark.parametrize("kv, cap, rotated", [(4, None, False), (2, None, False), (2, None, True), (2, 0.8, False), (1, 0.8, True)])


@CASES
def test_scores_are_recomputed_as_the_model_computes_them(kv: int, cap: float | None, rotated: bool) -> None:
    q, k = queries_keys(kv, 1)
    raw = dense_scores(q, k, kv, rotated)
    near(Scores(geometry(kv, cap, rotated))(q, k), raw if cap is None else cap * torch.tanh(raw / cap))


@CASES
@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("identity", [False, True])
def test_uniform_scores(kv: int, cap: float | None, rotated: bool, part: float, identity: bool) -> None:
    q, k = queries_keys(kv, 1)
    g, raw = scores_like(3), dense_scores(q, k, kv, rotated)
    slope = torch.ones_like(raw)
    if cap is not None:
        r = raw / cap
        slope = torch.tanh(r) / r if identity else 1 / torch.cosh(r) ** 2
    operation = Scores(geometry(kv, cap, rotated))
    rule = rule_of(operation, Scale(part), Identity() if identity else Rule())
    assert rule.is_plain == (part == 1.0 and (cap is None or not identity))
    if rule.is_plain:
        rule = CappedScoresRule(Scale(1.0), Scale(1.0)) if cap else Scale(1.0)
    for got, want in zip(back(rule, operation, (q, k), g), dense_back(part * slope * g, q, k, kv, rotated), strict=True):
        assert got is not None
        near(got, want)
    kept = sink(rule, operation, (q, k), g)
    assert torch.allclose(kept, remainder(rule, operation, (q, k), g), atol=1e-10)
    conserves = part == 0.5 and (cap is None or identity)
    assert bool((kept.abs() < 1e-10).all()) == conserves
    if part == 1.0 and cap is None:  # the plain gradient of a product counts twice
        near(kept, -(operation(q, k) * g).sum((1, 2, 3)))


@CASES
def test_pair_product_of_queries_and_keys(kv: int, cap: float | None, rotated: bool) -> None:
    run1, run2, g = queries_keys(kv, 1), queries_keys(kv, 2), scores_like(3)
    operation = Scores(geometry(kv, cap, rotated))
    rule = rule_of(operation, PairProduct(), Rescale())
    got = back(rule, operation, run1, g, run2)
    slope: Tensor | float = 1.0
    if cap is not None:
        r1, r2 = (dense_scores(*run, kv, rotated) / cap for run in (run1, run2))
        slope = (torch.tanh(r1) - torch.tanh(r2)) / (r1 - r2)
    want = dense_back(slope * g, (run1[0] + run2[0]) / 2, (run1[1] + run2[1]) / 2, kv, rotated)
    for a, b in zip(got, want, strict=True):
        assert a is not None
        near(a, b)
    effect = ((operation(*run1) - operation(*run2)) * g).sum((1, 2, 3))
    near(sum(((a - b) * c).sum((1, 2)) for a, b, c in zip(run1, run2, got, strict=True)), effect, 1e-11)  # type: ignore[operator, arg-type]
    assert sink(rule, operation, run1, g, run2).tolist() == [0, 0]
    for a, b in zip(got, back(rule, operation, run2, g, run1), strict=True):
        near(a, b)  # type: ignore[arg-type]
    for a, b in zip(back(rule, operation, run1, g, run1), back(Scale(1.0), operation, run1, g), strict=True):
        near(a, b, 1e-9)  # type: ignore[arg-type]


def dense_mix(pattern: Tensor, v: Tensor, kv: int) -> Tensor:
    return torch.stack([pattern[:, h] @ heads(v, kv)[:, :, h * kv // HEADS] for h in range(HEADS)], 2).flatten(2)


def dense_mix_back(g: Tensor, pattern: Tensor, v: Tensor, kv: int) -> tuple[Tensor, Tensor]:
    g, v = heads(g, HEADS), heads(v, kv)
    to_pattern = torch.stack([torch.einsum("btd,bsd->bts", g[:, :, h], v[:, :, h * kv // HEADS]) for h in range(HEADS)], 1)
    to_v = torch.zeros_like(v)
    for h in range(HEADS):
        to_v[:, :, h * kv // HEADS] += torch.einsum("bts,btd->bsd", pattern[:, h], g[:, :, h])
    return to_pattern, to_v.flatten(2)


def mix_inputs(kv: int, seed: int) -> tuple[Tensor, Tensor]:
    return scores_like(seed).softmax(-1), normal(BATCH, POS, kv * D_HEAD, seed=seed + 50)


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_half_on_z(kv: int) -> None:
    operation, inputs, g = Mix(geometry(kv)), mix_inputs(kv, 1), normal(BATCH, POS, HEADS * D_HEAD, seed=3)
    near(operation(*inputs), dense_mix(*inputs, kv))
    for got, want in zip(back(Half, operation, inputs, g), dense_mix_back(g / 2, *inputs, kv), strict=True):
        near(got, want)  # type: ignore[arg-type]
    assert remainder(Half, operation, inputs, g).abs().max() < 1e-11
    assert sink(Half, operation, inputs, g).tolist() == [0, 0]
    near(sink(Rule(), operation, inputs, g), -(operation(*inputs) * g).sum((1, 2)))  # the plain gradient counts twice
    near(sink(Half, operation, inputs, g, mix_inputs(kv, 2)), remainder(Half, operation, inputs, g, mix_inputs(kv, 2)), 1e-9)


def test_constant_lets_nothing_through() -> None:
    assert ConstantOutput.backward(Softmax(), (), scores_like(1))[0].abs().max() == 0  # type: ignore[union-attr]
    x, g = scores_like(1), scores_like(2)
    near(sink(ConstantOutput, Softmax(), (x,), g), (x.softmax(-1) * g).sum((1, 2, 3)))


@pytest.mark.parametrize("kv", [4, 2, 1])
def test_pair_product_of_pattern_and_values(kv: int) -> None:
    operation, run1, run2, g = Mix(geometry(kv)), mix_inputs(kv, 1), mix_inputs(kv, 2), normal(BATCH, POS, HEADS * D_HEAD, seed=3)
    got = back(PairProduct(), operation, run1, g, run2)
    want = dense_mix_back(g, (run1[0] + run2[0]) / 2, (run1[1] + run2[1]) / 2, kv)
    for a, b in zip(got, want, strict=True):
        near(a, b)  # type: ignore[arg-type]
    effect = ((dense_mix(*run1, kv) - dense_mix(*run2, kv)) * g).sum((1, 2))
    near(sum(((a - b) * c).flatten(1).sum(1) for a, b, c in zip(run1, run2, got, strict=True)), effect, 1e-11)  # type: ignore[operator, arg-type]


# The softmax.


def mask(x: Tensor, value: float, causal: bool = True) -> Tensor:
    hidden = torch.ones(x.shape[-2:], dtype=torch.bool).triu(1) if causal else torch.zeros(x.shape[-2:], dtype=torch.bool)
    return x.masked_fill(hidden, value)


def row_matrix(rule: Rule, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """The rule's matrix on one row of scores [n]."""
    n = len(x1)
    rows = x1.expand(1, 1, n, n)
    others = None if x2 is None else (x2.expand(1, 1, n, n),)
    (coefficient,) = back(rule, Softmax(), (rows,), torch.eye(n, dtype=x1.dtype).reshape(1, 1, n, n), others)
    assert coefficient is not None
    return coefficient[0, 0]


def log_mean(x1: Tensor, x2: Tensor) -> Tensor:
    """The logarithmic mean of two softmaxes, by its textbook formula with the logarithms taken by hand."""
    logs = [[v - max(x) - math.log(sum(math.exp(u - max(x)) for u in x)) for v in x] for x in (x1.tolist(), x2.tolist())]
    return torch.tensor([(math.exp(a) - math.exp(b)) / (a - b) for a, b in zip(*logs, strict=True)], dtype=FP64)


ROW1, ROW2 = torch.tensor([0.3, -1.2, 2.0, 0.9], dtype=FP64), torch.tensor([1.1, 0.4, -0.5, 0.1], dtype=FP64)


def test_pair_softmax_dense() -> None:
    l = log_mean(ROW1, ROW2)  # noqa: E741
    matrix = row_matrix(PairSoftmax(), ROW1, ROW2)
    near(matrix, torch.diag(l) - torch.outer(l, l) / l.sum())
    near(matrix @ (ROW1 - ROW2), ROW1.softmax(0) - ROW2.softmax(0))
    near(matrix, matrix.T)
    near(matrix, row_matrix(PairSoftmax(), ROW2, ROW1))


def test_pair_softmax_does_not_see_shifts() -> None:
    near(row_matrix(PairSoftmax(), ROW1 + 17.0, ROW2 - 230.0), row_matrix(PairSoftmax(), ROW1, ROW2))
    assert row_matrix(PairSoftmax(), ROW1, ROW2).sum(0).abs().max() < 1e-15  # nor does what it gives back


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9])
def test_pair_softmax_of_equal_runs_is_the_jacobian(gap: float) -> None:
    p = ROW1.softmax(0)
    jacobian = torch.diag(p) - torch.outer(p, p)
    near(row_matrix(PairSoftmax(), ROW1 + gap * ROW2, ROW1), jacobian, 1e-8 if gap else 1e-14)
    near(row_matrix(SoftmaxTemperature(1.0), ROW1), jacobian)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pair_softmax_where_a_saturated_softmax_has_gradient_zero(dtype: torch.dtype) -> None:
    """A gap of 1,000: probabilities underflow, the gradient is exactly zero, and all of the effect is found."""
    x1, x2 = (torch.tensor([[[row]]], dtype=dtype) for row in ([1000.0, 0.0, -1000.0], [0.0, 1000.0, -1000.0]))
    g = torch.tensor([[[[1.0, -2.0, 0.0]]]], dtype=dtype)
    leaf = x1.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(leaf.softmax(-1), leaf, g)
    assert gradient.abs().max() == 0
    (coefficient,) = back(PairSoftmax(), Softmax(), (x1,), g, (x2,))
    assert coefficient is not None and bool(torch.isfinite(coefficient).all())
    assert float((coefficient.double() * (x1 - x2).double()).sum()) == pytest.approx(3.0, rel=1e-6)
    near(coefficient.double().flatten(), torch.tensor([1.5e-3, -1.5e-3, 0.0], dtype=FP64), 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_softmax_temperature_dense(temperature: float) -> None:
    """The gradient at temperature T without the factor 1/T."""
    p = torch.tensor([math.exp(v / temperature) for v in ROW1.tolist()], dtype=FP64)
    p = p / p.sum()
    near(row_matrix(SoftmaxTemperature(temperature), ROW1), torch.diag(p) - torch.outer(p, p))
    x, g = scores_like(1), scores_like(2)
    near(sink(SoftmaxTemperature(temperature), Softmax(), (x,), g), remainder(SoftmaxTemperature(temperature), Softmax(), (x,), g))


@pytest.mark.parametrize("value", [float("-inf"), MIN])
@pytest.mark.parametrize("rule", [PairSoftmax(), SoftmaxTemperature(2.0)], ids=["pair", "temperature"])
def test_masked_entries_get_exactly_zero(value: float, rule: Rule) -> None:
    x1, x2, g = mask(scores_like(1), value), mask(scores_like(2), value), scores_like(3)
    (coefficient,) = back(rule, Softmax(), (x1,), g, (x2,))
    assert coefficient is not None and bool(torch.isfinite(coefficient).all())
    assert coefficient.triu(1).abs().max() == 0 and coefficient.abs().max() > 0
    cut1, cut2 = x1[..., 3, :4].unsqueeze(-2), x2[..., 3, :4].unsqueeze(-2)  # the same as if the masked keys were not there
    near(coefficient[..., 3, :4].unsqueeze(-2), back(rule, Softmax(), (cut1,), g[..., 3, :4].unsqueeze(-2), (cut2,))[0])  # type: ignore[arg-type]


def test_finfo_min_added_to_scores_is_a_mask() -> None:
    """Hugging Face adds finfo.min to scores, which may be more than the dtype holds or a little less than finfo.min itself."""
    x1, x2, g = scores_like(1).float(), scores_like(2).float(), scores_like(3).float()
    hidden = torch.zeros(POS, POS).masked_fill(torch.ones(POS, POS).triu(1).bool(), torch.finfo(torch.float32).min)
    (coefficient,) = back(PairSoftmax(), Softmax(), (x1 + hidden,), g, (x2 + hidden,))
    (expected,) = back(PairSoftmax(), Softmax(), (mask(x1, float("-inf")),), g, (mask(x2, float("-inf")),))
    near(coefficient, expected, 1e-6)  # type: ignore[arg-type]


def test_a_masked_score_has_no_relevance() -> None:
    """-inf times 0, which would be NaN; where something arrives it stays what it is."""
    scores, coefficients = torch.tensor([float("-inf"), MIN, 2.0, float("-inf")]), torch.tensor([0.0, 0.0, 3.0, 1.0])
    assert share(scores, coefficients).tolist() == [0.0, 0.0, 6.0, float("-inf")]


def test_a_row_without_anything_to_see_has_an_empty_pattern() -> None:
    scores = torch.zeros(1, 1, 2, 3)
    scores[..., 0, :] = float("-inf")
    assert Softmax()(scores)[0, 0].sum(-1).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("value", [float("-inf"), MIN])
def test_fully_masked_rows_are_finite(value: float) -> None:
    x1, x2, g = scores_like(1), scores_like(2), scores_like(3)
    x1[0, :, 1], x2[0, :, 1], x2[1, :, 2] = value, value, value  # row 1 in both runs, row 2 of example 1 in the reference alone
    for rule in (PairSoftmax(), SoftmaxTemperature(2.0)):
        (coefficient,) = rule.backward(Softmax(), rule.keep(Softmax(), (x1,), x1.softmax(-1), Reference((x2,), x2.softmax(-1))), g)
        assert coefficient is not None and bool(torch.isfinite(coefficient).all())
        assert coefficient[0, :, 1].abs().max() == 0


def test_zero_patterns_are_finite() -> None:
    """A pattern of zeros (a fully masked row after the model's own clean-up) in a product."""
    operation, g = Mix(geometry()), normal(BATCH, POS, HEADS * D_HEAD, seed=3)
    nothing = torch.zeros(BATCH, HEADS, POS, POS, dtype=FP64), normal(BATCH, POS, KEY_VALUE_HEADS * D_HEAD, seed=4)
    for coefficient in back(PairProduct(), operation, nothing, g, nothing):
        assert coefficient is not None and bool(torch.isfinite(coefficient).all())


@settings(max_examples=100, deadline=None)
@given(
    seed=SEEDS,
    dtype=DTYPES,
    n=st.integers(1, 12),
    spread=st.sampled_from([1e-6, 1.0, 30.0, 1000.0]),
    closeness=st.sampled_from([0.0, 1e-12, 1e-6, 1e-2, 1.0]),
    value=st.sampled_from([None, float("-inf"), "min"]),
    dead=st.booleans(),
)
def test_pair_softmax_is_exact_whatever_it_meets(
    seed: int, dtype: torch.dtype, n: int, spread: float, closeness: float, value: float | str | None, dead: bool
) -> None:
    x1 = normal(2, 2, n, n, seed=seed, dtype=dtype, scale=spread)
    x2 = (x1 + closeness * normal(2, 2, n, n, seed=seed + 1, dtype=dtype, scale=spread)).to(dtype)
    g = normal(2, 2, n, n, seed=seed + 2, dtype=dtype)
    if value is not None:
        filler = torch.finfo(dtype).min if value == "min" else float("-inf")
        x1, x2 = mask(x1, filler), mask(x2, filler)
        if dead:
            x1[0, :, 0], x2[0, :, 0] = filler, filler
    weights = logarithmic_mean(x1.float() if dtype == torch.bfloat16 else x1, x2.float() if dtype == torch.bfloat16 else x2)
    assert bool(torch.isfinite(weights).all()) and bool((weights >= 0).all()) and bool((weights <= 1.000001).all())
    (coefficient,) = back(PairSoftmax(), Softmax(), (x1,), g, (x2,))
    assert coefficient is not None and bool(torch.isfinite(coefficient).all())
    hidden = torch.isneginf(x1.to(FP64)) | (x1 == torch.finfo(dtype).min)
    gap = (x1.to(FP64) - x2.to(FP64)).masked_fill(hidden, 0.0)
    p1, p2 = (x.to(FP64).masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0) for x in (x1, x2))
    got, want = (gap * coefficient.to(FP64)).sum(-1), ((p1 - p2) * g.to(FP64)).sum(-1)
    size = g.abs().to(FP64).amax(-1) * gap.abs().amax(-1).clamp(max=1.0 + spread)
    assert bool(((got - want).abs() <= (1e-12 if dtype == FP64 else 5e-6) * (size + 1e-3)).all())


@CASES
def test_scores_add_the_mask_that_the_geometry_says(kv: int, cap: float | None, rotated: bool) -> None:
    shape, plain, inputs = geometry(kv, cap, rotated), geometry(kv, cap, rotated), queries_keys(kv, 1)
    shape.bias = lambda scores: torch.zeros_like(scores).masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), float("-inf"))
    assert torch.equal(Scores(shape)(*inputs), mask(Scores(plain)(*inputs), float("-inf")))
    for a, b in zip(
        back(rule_of(Scores(shape), Half, Identity()), Scores(shape), inputs, scores_like(3)),
        back(rule_of(Scores(plain), Half, Identity()), Scores(plain), inputs, scores_like(3)),
        strict=True,
    ):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]


def test_half_scales_the_output_and_equals_quarters_at_the_factors() -> None:
    """Half at z and at the scores is the same as q/4, k/4, v/2 under a plain softmax."""
    q, k, v = (normal(BATCH, POS, HEADS * D_HEAD, seed=i).requires_grad_(True) for i in range(3))
    shape, g = geometry(4), normal(BATCH, POS, HEADS * D_HEAD, seed=5)
    mix, scores = Mix(shape), Scores(shape)
    plain = torch.autograd.grad(mix(scores(q, k).softmax(-1), v), (q, k, v), g)
    x = scores(q, k).detach()
    to_pattern, to_v = back(Half, mix, (x.softmax(-1), v), g)
    (to_scores,) = back(SoftmaxTemperature(1.0), Softmax(), (x,), to_pattern)  # type: ignore[arg-type]
    to_q, to_k = back(Half, scores, (q, k), to_scores)  # type: ignore[arg-type]
    for got, want, part in zip((to_q, to_k, to_v), plain, (4, 4, 2), strict=True):
        near(got, want / part)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", [PairProduct(), CappedScoresRule(Half, Identity()), Scale(0.5)], ids=repr)
def test_scores_broadcast_over_leading_dimensions(rule: Rule) -> None:
    if rule.on_output:
        near(rule.backward(Scores(geometry()), (), scores_like(1))[0], scores_like(1) / 2)  # type: ignore[arg-type]
        return
    run1, run2, many = queries_keys(2, 1), queries_keys(2, 2), normal(3, BATCH, HEADS, POS, POS, seed=7)
    operation = Scores(geometry(cap=0.8 if isinstance(rule, CappedScoresRule) else None))
    kept = rule.keep(operation, run1, operation(*run1), Reference(run2, operation(*run2)))
    for i in (0, 1):
        each = torch.stack([rule.backward(operation, kept, g)[i] for g in many])  # type: ignore[misc]
        near(rule.backward(operation, kept, many)[i], each)  # type: ignore[arg-type]


def test_pattern_and_z_broadcast_over_leading_dimensions() -> None:
    x1, x2, many = scores_like(1), scores_like(2), normal(3, BATCH, HEADS, POS, POS, seed=7)
    for rule in (PairSoftmax(), SoftmaxTemperature()):
        kept = rule.keep(Softmax(), (x1,), x1.softmax(-1), Reference((x2,), x2.softmax(-1)))
        each = torch.stack([rule.backward(Softmax(), kept, g)[0] for g in many])  # type: ignore[misc]
        near(rule.backward(Softmax(), kept, many)[0], each)  # type: ignore[arg-type]
    operation, run1, run2, wide = Mix(geometry()), mix_inputs(2, 1), mix_inputs(2, 2), normal(3, BATCH, POS, HEADS * D_HEAD, seed=8)
    kept = PairProduct().keep(operation, run1, operation(*run1), Reference(run2, operation(*run2)))
    for i in (0, 1):
        each = torch.stack([PairProduct().backward(operation, kept, g)[i] for g in wide])  # type: ignore[misc]
        near(PairProduct().backward(operation, kept, wide)[i], each)  # type: ignore[arg-type]


def test_bf16_scores_are_treated_in_fp32() -> None:
    x1, x2, g = (scores_like(i).to(torch.bfloat16) for i in (1, 2, 3))
    (half,) = back(PairSoftmax(), Softmax(), (x1,), g, (x2,))
    (full,) = back(PairSoftmax(), Softmax(), (x1.float(),), g.float(), (x2.float(),))
    assert half is not None and half.dtype == torch.float32
    near(half, full, 1e-6)  # type: ignore[arg-type]


def test_rules_that_need_a_reference_say_so() -> None:
    assert all(r.needs_reference for r in (PairProduct(), PairSoftmax(), Rescale()))
    assert not any(r.needs_reference for r in (Half, ConstantOutput, ConstantFirstFactor(), Identity(), SoftmaxTemperature(), Rule()))
