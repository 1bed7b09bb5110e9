"""The product form and the log-probability form between two runs, over shapes, precisions and distances."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lens_relevance.inputs.metrics import AtPositions, LogProbs
from lens_relevance.rules import AttentionGeometry, CappedScoresRule, Mix, PairProduct, Reference, Rescale, Rule, Scores
from tests.rules.dense import normal

CLOSENESS = st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 30.0])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    pos=st.integers(1, 6),
    d_head=st.integers(1, 5),
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)]),
    cap=st.sampled_from([None, 0.5, 30.0]),
    closeness=CLOSENESS,
)
def test_products_are_exact_whatever_they_meet(
    seed: int, pos: int, d_head: int, groups: tuple[int, int], cap: float | None, closeness: float
) -> None:
    heads, kv = groups
    geometry = AttentionGeometry(heads, kv, d_head, scale=d_head**-0.5, soft_cap=cap)
    q, k, v = (normal(2, pos, n * d_head, seed=seed + i) for i, n in enumerate((heads, kv, kv)))
    pattern = normal(2, heads, pos, pos, seed=seed + 3)
    for op, inputs in ((Scores(geometry), (q, k)), (Mix(geometry), (pattern, v))):
        others = tuple(x + closeness * normal(*x.shape, seed=seed + 4 + i) for i, x in enumerate(inputs))
        y, y2 = op(*inputs), op(*others)
        g = normal(*y.shape, seed=seed + 8)
        rule: Rule = PairProduct() if len(op.parts) == 1 else CappedScoresRule(PairProduct(), Rescale())
        coefficients = rule.backward(op, rule.keep(op, inputs, y, Reference(others, y2)), g)
        total = sum(((x - other) * c).sum() for x, other, c in zip(inputs, others, coefficients, strict=True) if c is not None)
        expected = ((y - y2) * g).sum()
        size = float(((y - y2) * g).abs().sum()) + 1e-12 * float((y * g).abs().sum())
        assert all(c is not None and bool(torch.isfinite(c).all()) for c in coefficients)
        assert abs(float(total - expected)) <= 1e-9 * size + 1e-13


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.integers(2, 9),
    scale=st.sampled_from([1e-6, 1.0, 30.0, 1000.0]),
    closeness=st.sampled_from([0.0, 1e-9, 1e-3, 1.0]),
)
def test_log_probabilities_are_exact_whatever_they_meet(seed: int, vocabulary: int, scale: float, closeness: float) -> None:
    one = normal(2, 3, vocabulary, seed=seed) * scale
    two = one + closeness * scale * normal(2, 3, vocabulary, seed=seed + 1)
    metric = AtPositions(torch.tensor([[0, 2], [1, 1]]), LogProbs(torch.tensor([[0, 1], [1, 0]])))
    coefficients = metric.pair_coefficients(one, two)
    assert bool(torch.isfinite(coefficients).all())
    gap = metric(one) - metric(two)
    torch.testing.assert_close(
        ((one - two) * coefficients).sum((1, 2)), gap, rtol=1e-9, atol=1e-14 * (1 + scale)
    )  # the floor: rounding of the metric itself
