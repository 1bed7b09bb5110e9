"""Mixtures of experts against their dense formula, written token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_relevance import LivenessError
from lens_relevance.rules import ClampedGate, Expert, Experts, ExpertsRule, GatedActivation, Reference, Router
from lens_relevance.rules.experts import _Routed
from tests.rules.test_activation import PRODUCTS, gated

E, D, M, TOP = 5, 6, 4, 2
# As Mixtral, Qwen3-MoE, DeepSeek-V3 and GPT-OSS route and gate.
KINDS = ("softmax", "over_all", "sigmoid_shared", "biased_clamped")
ALPHA, LIMIT, SCALE = 1.7, 0.6, 2.5

silu = torch.nn.functional.silu


def experts_rule(activation: str, product: str, router: str) -> ExpertsRule:
    return ExpertsRule(gated(activation, product), PRODUCTS[router])


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _expert(seed: int, biased: bool) -> Expert:
    biases = (_random(M, seed=seed + 3), _random(M, seed=seed + 4), _random(D, seed=seed + 5)) if biased else ()
    return Expert(_random(M, D, seed=seed), _random(M, D, seed=seed + 1), _random(D, M, seed=seed + 2), *biases)


def _operation(kind: str) -> Experts:
    weight, bias = _random(E, D, seed=3), _random(E, seed=4) if kind == "biased_clamped" else None
    experts = [_expert(10 * e + 100, kind == "biased_clamped") for e in range(E)]

    def choose(x: Tensor) -> Tensor:
        scores = x @ weight.T
        return (scores if bias is None else scores + bias).topk(TOP, -1).indices

    sigmoid = kind == "sigmoid_shared"
    router = Router(weight, choose, bias, over_all=kind == "over_all", sigmoid=sigmoid, scale=SCALE if sigmoid else 1.0)
    gated = ClampedGate(ALPHA, LIMIT) if kind == "biased_clamped" else GatedActivation(silu)
    return Experts(router, lambda e: experts[e], E, gated=gated, shared=_expert(900, False) if sigmoid else None)


def _neurons(kind: str, gate: Tensor, up: Tensor) -> Tensor:
    if kind != "biased_clamped":
        return silu(gate) * up
    gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
    return gate / (1 + torch.exp(-ALPHA * gate)) * (up + 1)


def _mlp(kind: str, expert: Expert, x: Tensor) -> Tensor:
    zero = torch.zeros((), dtype=x.dtype)
    gate = expert.gate @ x + (zero if expert.gate_bias is None else expert.gate_bias)
    up = expert.up @ x + (zero if expert.up_bias is None else expert.up_bias)
    return expert.down @ _neurons(kind, gate, up) + (zero if expert.down_bias is None else expert.down_bias)


def _weights(kind: str, op: Experts, x: Tensor) -> Tensor:
    """Router weights [expert] of one token, 0 for those not chosen."""
    scores = op.router.weight @ x + (0 if op.router.bias is None else op.router.bias)
    chosen = torch.zeros(E, dtype=torch.bool).index_fill(0, scores.topk(TOP).indices, True)
    if kind == "over_all":
        return scores.softmax(-1) * chosen
    if kind == "sigmoid_shared":
        probabilities = torch.sigmoid(scores) * chosen
        return SCALE * probabilities / probabilities.sum()
    exponentials = torch.exp(scores) * chosen
    return exponentials / exponentials.sum()


def _dense(kind: str, op: Experts, x: Tensor) -> Tensor:
    """The whole mixture, differentiable, from nothing but weights."""
    rows = []
    for token in x.flatten(0, -2):
        weights = _weights(kind, op, token)
        y = sum((weights[e] * _mlp(kind, op.expert(e), token) for e in range(E)), torch.zeros(D, dtype=x.dtype))
        rows.append(y if op.shared is None else y + _mlp(kind, op.shared, token))
    return torch.stack(rows).reshape(x.shape)


def _inputs(seed: int = 0) -> Tensor:
    return _random(2, 3, D, seed=seed)


def _back(op: Experts, rule: ExpertsRule, x: Tensor, g: Tensor, other: Tensor | None = None) -> Tensor:
    reference = None if other is None else Reference((other,), op(other))
    (c,) = rule.backward(op, rule.keep(op, (x,), op(x), reference), g)
    assert c is not None
    return c


def _close(actual: Tensor, expected: Tensor) -> None:
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_operation_is_a_weighted_sum_token_by_token(kind: str) -> None:
    op, x = _operation(kind), _inputs()
    _close(op(x), _dense(kind, op, x))
    assert {int(e) for e in op.router.choose(x.flatten(0, 1)).flatten()} != {0, 1}


@pytest.mark.parametrize("kind", KINDS)
def test_all_plain_is_the_gradient(kind: str) -> None:
    op, g = _operation(kind), _inputs(1)
    x = _inputs().requires_grad_(True)
    (expected,) = torch.autograd.grad(_dense(kind, op, x), x, g)
    _close(_back(op, experts_rule("gradient", "gradient", "gradient"), x.detach(), g), expected)


@pytest.mark.parametrize("kind", ["softmax", "over_all", "sigmoid_shared"])
def test_a_constant_router_and_gate_conserve(kind: str) -> None:
    op, x, g = _operation(kind), _inputs(), _inputs(1)
    rule = experts_rule("identity", "constant", "constant")
    _close((x * _back(op, rule, x, g)).sum(-1), (op(x) * g).sum(-1))
    assert float(rule.sink(op, (x,), op(x), None, g).abs().max()) == 0
    loose = _back(op, experts_rule("identity", "constant", "gradient"), x, g)
    assert not torch.allclose((x * loose).sum(-1), (op(x) * g).sum(-1))  # the router takes a share of its own


@pytest.mark.parametrize("product", ["constant", "half"])
def test_biases_are_all_that_a_clamped_gate_keeps(product: str) -> None:
    """y g = x c + what g finds at the biases of down, and at those of gate and up by way of the neurons' coefficients."""
    op, x, g = _operation("biased_clamped"), _inputs(), _inputs(1)
    rule = experts_rule("identity", product, "constant")
    kept = rule.keep(op, (x,), op(x), None)
    biases = torch.zeros(2 * 3, dtype=x.dtype)
    for e in range(E):
        expert, of = op.expert(e), _Routed(*kept[3 + 6 * e : 9 + 6 * e])
        assert expert.gate_bias is not None and expert.up_bias is not None and expert.down_bias is not None
        here = g.flatten(0, 1)[of.tokens] * of.weight
        neurons = here @ expert.down
        at_biases = here @ expert.down_bias + (neurons * of.to_gate) @ expert.gate_bias + (neurons * of.to_up) @ expert.up_bias
        biases.index_add_(0, of.tokens, at_biases)
    (c,) = rule.backward(op, kept, g)
    assert c is not None
    _close((x * c).sum(-1) + biases.reshape(2, 3), (op(x) * g).sum(-1))
    _close(rule.sink(op, (x,), op(x), None, g), biases.reshape(2, 3).sum(1))


@pytest.mark.parametrize("kind", KINDS)
def test_half_is_half_of_each_factor(kind: str) -> None:
    """Relevance of y splits evenly: one half to the experts, one half to the router weights; shared experts have no router."""
    op, x, g = _operation(kind), _inputs(), _inputs(1)
    parts = {router: _back(op, experts_rule("identity", "half", router), x, g) for router in ("half", "constant")}
    only_shared = torch.zeros_like(x)
    if op.shared is not None:
        alone = Experts(
            op.router, lambda e: Expert(*(0 * w for w in (op.expert(e).gate, op.expert(e).up, op.expert(e).down))), E, gated=op.gated
        )
        alone.shared = op.shared
        only_shared = _back(alone, experts_rule("identity", "half", "constant"), x, g)
    router_only = parts["half"] - only_shared - (parts["constant"] - only_shared) / 2
    leaf = x.clone().requires_grad_(True)
    tokens = leaf.flatten(0, 1)
    outs = torch.stack([torch.stack([_mlp(kind, op.expert(e), t) for e in range(E)]) for t in x.flatten(0, 1)])
    weights = torch.stack([_weights(kind, op, t) for t in tokens])
    (expected,) = torch.autograd.grad((weights.unsqueeze(-1) * outs).sum(1), leaf, g.flatten(0, 1) / 2)
    _close(router_only, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_form_is_exact_and_names_a_changed_choice(kind: str) -> None:
    op, x, g = _operation(kind), _inputs(), _inputs(1)
    rule = experts_rule("rescale", "pair", "pair")
    for other, alike in ((x + 1e-3 * _inputs(2), True), (_inputs(2), False)):
        reference = Reference((other,), op(other))
        sink = rule.sink(op, (x,), op(x), reference, g)
        difference = ((_dense(kind, op, x) - _dense(kind, op, other)) * g).sum((1, 2))
        _close(((x - other) * _back(op, rule, x, g, other)).sum((1, 2)) + sink, difference)
        assert (float(sink.abs().max()) == 0) is alike
        rest = rule.backward_and_rest(op, rule.keep(op, (x,), op(x), reference), g)[1]  # the same from what the backward has at hand
        assert rest is not None
        torch.testing.assert_close(rest.reshape(2, 3).sum(1), sink, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pair_form_of_a_run_with_itself_is_the_gradient(kind: str) -> None:
    op, x, g = _operation(kind), _inputs(), _inputs(1)
    plain = _back(op, experts_rule("gradient", "gradient", "gradient"), x, g)
    torch.testing.assert_close(_back(op, experts_rule("rescale", "pair", "pair"), x, g, x.clone()), plain, rtol=1e-9, atol=1e-12)


def test_upstream_may_carry_leading_dimensions() -> None:
    op, x = _operation("sigmoid_shared"), _inputs()
    rule = experts_rule("identity", "half", "half")
    kept = rule.keep(op, (x,), op(x), None)
    many = torch.stack([_inputs(1), _inputs(2)])
    (together,) = rule.backward(op, kept, many)
    assert together is not None
    for i in range(2):
        (alone,) = rule.backward(op, kept, many[i])
        assert alone is not None
        _close(together[i], alone)


def test_a_mixture_that_computes_something_else_is_refused() -> None:
    op, x = _operation("softmax"), _inputs()
    rule = experts_rule("identity", "half", "half")
    rule.keep(op, (x,), op(x) * (1 + 1e-7), None)
    wrong = op(x)
    wrong[1, 2] += 1e-2
    with pytest.raises(LivenessError, match="mixture of experts does not compute"):
        rule.keep(op, (x,), wrong, None)
