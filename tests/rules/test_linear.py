"""Linear layers keep their bias and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_relevance.rules import EpsilonRule, GammaRule, Linear, Rule, ZeroRule, ZPlusRule
from lens_relevance.rules.linear import FewOutputsRule
from tests.rules.dense import back, near, normal, sink

X1, X2, G, W, B = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2), normal(2, 3, 5, seed=3), normal(5, 4, seed=4), normal(5, seed=5)


def test_the_bias_keeps_its_share() -> None:
    operation = Linear(W, B)
    near(operation(X1), torch.einsum("oi,bpi->bpo", W, X1) + B)
    left = ((operation(X1) * G).sum((1, 2))) - (X1 * torch.einsum("oi,bpo->bpi", W, G)).sum((1, 2))
    near(sink(ZeroRule(), operation, (X1,), G), left)
    near(left, (B * G).sum((1, 2)))
    assert ZeroRule().is_plain and Rule().is_plain


@pytest.mark.parametrize("outputs", [[1], [0, 4], [0, 1, 2, 3, 4]])
def test_outputs_without_a_coefficient_cost_nothing_and_change_nothing(outputs: list[int]) -> None:
    """W^T g over the outputs that any token reads; each token reads others."""
    operation, g, rule = Linear(W, B), torch.zeros_like(G), FewOutputsRule()
    for i, output in enumerate(outputs):
        g[i % 2, i % 3, output] = G[i % 2, i % 3, output]
    (coefficient,) = rule.backward(operation, rule.keep(operation, (X1,), operation(X1), None), g)
    assert coefficient is not None and coefficient.shape == X1.shape and bool(coefficient.any())
    near(coefficient, torch.einsum("oi,bpo->bpi", W, g))
    near(sink(rule, operation, (X1,), g), (B * g).sum((1, 2)))
    assert not rule.is_plain and rule.is_exact


def test_between_two_runs_nothing_is_kept() -> None:
    operation = Linear(W, B)
    assert sink(ZeroRule(), operation, (X1,), G, (X2,)).tolist() == [0, 0]
    near(((operation(X1) - operation(X2)) * G).sum((1, 2)), ((X1 - X2) * (G @ W)).sum((1, 2)))


def test_without_bias_nothing_is_kept() -> None:
    assert sink(ZeroRule(), Linear(W, None), (X1,), G).tolist() == [0, 0]


def _layer(seed: int = 0) -> tuple[Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, bias, x, g = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((4, 3), (4,), (2, 5, 3), (2, 5, 4)))
    return Linear(weight, bias), x, g


@pytest.mark.parametrize("gamma", [0.0, 0.25, 10.0])
def test_gamma_is_its_dense_formula(gamma: float) -> None:
    """R_i = sum_j (z_ij + gamma z_ij [sign as y_j]) / (sum over i and the bias of the same) R_j, contribution by contribution."""
    op, x, g = _layer()
    assert op.bias is not None
    y = op(x)
    rule = GammaRule(gamma)
    (coefficient,) = rule.backward(op, rule.keep(op, (x,), y, None), g)
    assert coefficient is not None
    z = torch.cat([x.unsqueeze(-2) * op.weight, op.bias.expand_as(y).unsqueeze(-1)], -1)  # [.., output, input and bias]
    z = z + gamma * torch.where(y.unsqueeze(-1) > 0, z.clamp(min=0), z.clamp(max=0))
    expected = (z / z.sum(-1, keepdim=True) * (y * g).unsqueeze(-1)).sum(-2)
    torch.testing.assert_close(x * coefficient, expected[..., :-1], rtol=1e-10, atol=1e-12)
    assert float(expected.abs().min()) > 0


def test_z_plus_is_its_dense_formula() -> None:
    """R_i = sum_j (x_i w_ij)^+ / sum_k (x_k w_kj)^+ R_j, contribution by contribution; only an output without any loses what reaches it."""
    op, x, g = _layer()
    with torch.no_grad():
        op.weight[0], x[0, 0] = op.weight[0].abs(), -x[0, 0].abs()  # no positive contribution to output 0 at the first position
        x[1, 2, 1] = 0.0
    y = op(x)
    (coefficient,) = back(ZPlusRule(), op, (x,), g)
    assert coefficient is not None
    z = (x.unsqueeze(-2) * op.weight).clamp(min=0)  # [.., output, input]
    whole = z.sum(-1)
    assert float(whole[0, 0, 0]) == 0.0 and int((whole == 0).sum()) < 10
    relevance = torch.where(whole > 0, y * g, 0.0)
    expected = (z / whole.where(whole > 0, torch.ones_like(whole)).unsqueeze(-1) * relevance.unsqueeze(-1)).sum(-2)
    torch.testing.assert_close(x * coefficient, expected, rtol=1e-10, atol=1e-12)
    near((x * coefficient).sum((1, 2)), relevance.sum((1, 2)))
    near(sink(ZPlusRule(), op, (x,), g), torch.where(whole > 0, 0.0, y * g).sum((1, 2)))


def test_z_plus_on_the_layers_of_a_model() -> None:
    """With this rule at every linear layer the account closes, and what the bias would keep goes to the inputs."""
    from lens_relevance import propagate, rulesets
    from tests.engine.families import TARGET, build, inputs_and_reference, unexplained

    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    cache = propagate(model, tokens, TARGET, rules={**rulesets()["cp_lrp"], "linear": ZPlusRule()}, audit=True)
    assert unexplained(cache) < 1e-9
    assert not torch.allclose(cache.tokens(), propagate(model, tokens, TARGET, rules="cp_lrp").tokens())


@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_epsilon_is_its_dense_formula(epsilon: float) -> None:
    op, x, g = _layer(1)
    y = op(x)
    rule = EpsilonRule(epsilon)
    (coefficient,) = rule.backward(op, rule.keep(op, (x,), y, None), g)
    assert coefficient is not None
    expected = (x.unsqueeze(-2) * op.weight / (y + epsilon * y.sign()).unsqueeze(-1) * (y * g).unsqueeze(-1)).sum(-2)
    torch.testing.assert_close(x * coefficient, expected, rtol=1e-10, atol=1e-12)


def test_a_ruleset_of_ones_own_puts_gamma_on_chosen_layers() -> None:
    """gamma on the MLP's layers only, by mount position; the account still closes, with what gamma keeps under `biases`."""
    from lens_relevance import propagate, rulesets
    from tests.engine.families import TARGET, build, inputs_and_reference, unexplained

    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    table = {**rulesets()["attnlrp"], "linear@in": GammaRule(0.25), "linear@out": EpsilonRule(1e-3)}
    cache = propagate(model, tokens, TARGET, rules=table, audit=True)
    assert unexplained(cache) < 1e-9
    assert torch.equal(propagate(model, tokens, TARGET, rules=table, names_filter="unembed.hook_out").logits, model(tokens))
    assert not torch.allclose(cache.tokens(), propagate(model, tokens, TARGET, rules="attnlrp").tokens())
