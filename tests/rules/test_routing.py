"""Mixtures of experts against their dense formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_relevance.rules import Experts, ExpertsRule, Gated, Reference

E, D, M, TOP = 5, 6, 4, 2


def _operation(renormalize: bool) -> Experts:
    generator = torch.Generator().manual_seed(3)
    gate_up, down, router = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((E, 2 * M, D), (E, D, M), (E, D)))
    return Experts(gate_up, down, router, TOP, renormalize, torch.nn.functional.silu)


def _inputs(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_operation_is_a_weighted_sum_token_by_token(renormalize: bool) -> None:
    op, x = _operation(renormalize), _inputs()
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(3):
            probabilities = (op.router @ x[b, t]).softmax(-1)
            values, chosen = probabilities.topk(TOP)
            values = values / values.sum() if renormalize else values
            for weight, e in zip(values, chosen, strict=True):
                gate, up = (op.gate_up[e] @ x[b, t]).chunk(2)
                expected[b, t] += weight * (op.down[e] @ (torch.nn.functional.silu(gate) * up))
    _close(op(x), expected)


@pytest.mark.parametrize("renormalize", [True, False])
def test_all_plain_is_the_gradient(renormalize: bool) -> None:
    op, x, g = _operation(renormalize), _inputs(), _inputs(1)
    rule = ExpertsRule(Gated("gradient", "gradient"), "gradient")
    (expected,) = op.gradient((x,), g)
    (actual,) = rule.backward(op, rule.keep(op, (x,), op(x), None), g)
    assert expected is not None and actual is not None
    _close(actual, expected)


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_constant_router_and_gate_conserve(renormalize: bool) -> None:
    op, x, g = _operation(renormalize), _inputs(), _inputs(1)
    rule = ExpertsRule(Gated("identity", "constant"), "constant")
    (c,) = rule.backward(op, rule.keep(op, (x,), op(x), None), g)
    assert c is not None
    _close((x * c).sum(-1), (op(x) * g).sum(-1))
    doubled = ExpertsRule(Gated("identity", "constant"), "gradient")
    (c,) = doubled.backward(op, doubled.keep(op, (x,), op(x), None), g)
    assert c is not None and not torch.allclose((x * c).sum(-1), (op(x) * g).sum(-1))  # the router takes a share of its own


@pytest.mark.parametrize("renormalize", [True, False])
def test_half_is_half_of_each_factor(renormalize: bool) -> None:
    """Relevance of y splits evenly: one half to the experts (which conserve it), one half to the router weights."""
    op, x, g = _operation(renormalize), _inputs(), _inputs(1)
    parts = {}
    for router in ("half", "constant"):
        rule = ExpertsRule(Gated("identity", "half"), router)
        (c,) = rule.backward(op, rule.keep(op, (x,), op(x), None), g)
        assert c is not None
        parts[router] = c
    router_only = parts["half"] - parts["constant"] / 2
    scores = (x.flatten(0, 1) @ op.router.T).requires_grad_(True)
    kept = scores.topk(TOP).indices
    probabilities = scores.softmax(-1)
    weights = probabilities.gather(1, kept)
    weights = weights / weights.sum(-1, keepdim=True) if renormalize else weights
    outs = torch.stack([op.out(e, *op.parts(e, x.flatten(0, 1))) for e in range(E)], 1).detach()
    y = (weights.unsqueeze(-1) * outs.gather(1, kept.unsqueeze(-1).expand(-1, -1, D))).sum(1)
    (to_scores,) = torch.autograd.grad(y, scores, g.flatten(0, 1) / 2)
    _close(router_only.flatten(0, 1), to_scores @ op.router)


@pytest.mark.parametrize("renormalize", [True, False])
def test_the_pair_form_is_exact_and_names_a_changed_choice(renormalize: bool) -> None:
    op, x, g = _operation(renormalize), _inputs(), _inputs(1)
    rule = ExpertsRule(Gated("rescale", "pair"), "pair")
    for other, alike in ((x + 1e-3 * _inputs(2), True), (_inputs(2), False)):
        reference = Reference((other,), op(other))
        (c,) = rule.backward(op, rule.keep(op, (x,), op(x), reference), g)
        assert c is not None
        sink = rule.sink(op, (x,), op(x), reference, g)
        _close(((x - other) * c).sum((1, 2)) + sink, ((op(x) - op(other)) * g).sum((1, 2)))
        assert (float(sink.abs().max()) == 0) is alike


def test_upstream_may_carry_leading_dimensions() -> None:
    op, x = _operation(True), _inputs()
    rule = ExpertsRule(Gated("identity", "half"), "half")
    kept = rule.keep(op, (x,), op(x), None)
    many = torch.stack([_inputs(1), _inputs(2)])
    (together,) = rule.backward(op, kept, many)
    assert together is not None
    for i in range(2):
        (alone,) = rule.backward(op, kept, many[i])
        assert alone is not None
        _close(together[i], alone)
