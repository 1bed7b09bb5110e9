"""Convolutions under the rules for linear layers: against their dense matrix, alone and at a declared site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from lens_relevance import declare_sites, propagate, rulesets
from lens_relevance.rules import Convolution, EpsilonRule, GammaRule, Rule, Scale
from lens_relevance.sites import activation, convolution, linear
from tests.engine.families import close, unexplained
from tests.rules.dense import back, near, normal, remainder, sink

# Patches side by side, patches that overlap and do not fill the image, two groups with holes between the weights.
SETTINGS: list[dict[str, Any]] = [
    dict(stride=2),
    dict(stride=(3, 2), padding=(1, 0)),
    dict(stride=2, padding=1, dilation=2, groups=2),
]
X, OTHER = normal(2, 4, 7, 6, seed=1), normal(2, 4, 7, 6, seed=2)


def operation(settings: dict[str, Any], biased: bool = True) -> Convolution:
    weight = normal(6, 4 // settings.get("groups", 1), 2, 2, seed=3)
    return Convolution(weight, normal(6, seed=4) if biased else None, **settings)


def matrix(op: Convolution) -> Tensor:
    """The convolution as a matrix from pixels to outputs, column by column."""
    pixels = torch.eye(X[0].numel(), dtype=X.dtype).reshape(-1, *X.shape[1:])
    return nn.functional.conv2d(pixels, op.weight, None, **op.settings).flatten(1).T


def contributions(op: Convolution, x: Tensor) -> tuple[Tensor, Tensor]:
    """z_ij of every pixel i, and last of the bias, for every output j: [batch, output, pixel + 1]; and the outputs [batch, output]."""
    dense, y = matrix(op), op(x).flatten(1)
    bias = torch.zeros_like(y) if op.bias is None else op.bias[:, None, None].expand_as(op(x)).flatten(1)
    return torch.cat([x.flatten(1).unsqueeze(1) * dense, bias.unsqueeze(-1)], -1), y


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_the_rules_are_their_dense_formulas(settings: dict[str, Any], biased: bool) -> None:
    op = operation(settings, biased)
    z, y = contributions(op, X)
    near(z.sum(-1), y)
    near(op(X), nn.functional.conv2d(X, op.weight, op.bias, **settings))
    g = normal(*op(X).shape, seed=5)
    relevance = y * g.flatten(1)
    for rule, shares in {
        GammaRule(0.25): (own := z + 0.25 * torch.where(y.unsqueeze(-1) > 0, z.clamp(min=0), z.clamp(max=0))) / own.sum(-1, keepdim=True),
        EpsilonRule(0.5): z / (y + 0.5 * y.sign()).unsqueeze(-1),
    }.items():
        expected = (shares * relevance.unsqueeze(-1)).sum(1)[:, :-1].reshape(X.shape)
        (coefficient,) = back(rule, op, (X,), g)
        assert coefficient is not None
        near(X * coefficient, expected, 1e-10)
        near(sink(rule, op, (X,), g), remainder(rule, op, (X,), g), 1e-10)
    plain = op.compose({"linear": Rule()})
    assert plain.is_plain
    if biased:
        near(sink(plain, op, (X,), g), (z[:, :, -1] * g.flatten(1)).sum(1))
    assert sink(plain, op, (X,), g, (OTHER,)).tolist() == [0, 0]


@pytest.mark.parametrize("rule", [GammaRule(0.25), EpsilonRule(0.5)], ids=repr)
def test_upstream_may_carry_leading_dimensions(rule: Rule) -> None:
    op = operation(SETTINGS[1])
    kept = rule.keep(op, (X,), op(X), None)
    many = normal(3, *op(X).shape, seed=6)
    (together,) = rule.backward(op, kept, many)
    for one, g in zip(together, many, strict=True):  # type: ignore[arg-type]
        near(one, rule.backward(op, kept, g)[0])  # type: ignore[arg-type]


class Eye(HookedRootModule):
    """An image, cut into patches by a convolution, a ReLU, and a vote."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.out = nn.Conv2d(3, 5, 2, stride=2), nn.Linear(5, 4)
        self.hook_image, self.hook_pre, self.hook_post, self.hook_pooled, self.hook_logits = (HookPoint() for _ in range(5))
        self.setup()

    def forward(self, image: Tensor) -> Tensor:
        x = self.hook_post(torch.relu(self.hook_pre(self.patches(self.hook_image(image)))))
        return self.hook_logits(self.out(self.hook_pooled(x.mean((-1, -2)).unsqueeze(1))))


@pytest.mark.parametrize("rule", [Rule(), GammaRule(0.25), EpsilonRule(0.1), Scale(0.3)], ids=repr)
def test_relevance_of_pixels_at_a_declared_site(rule: Rule) -> None:
    torch.manual_seed(0)
    model = Eye().double().eval()
    sites = [
        convolution("embed.patches", "hook_image", "hook_pre", weight=model.patches.weight, bias=model.patches.bias, stride=2),
        activation("relu", "hook_pre", "hook_post", function=torch.relu),
        linear("head", "hook_pooled", "hook_logits", weight=model.out.weight, bias=model.out.bias),
    ]
    declare_sites(model, sites, embeddings=["hook_image"])
    image = normal(2, 3, 6, 4, seed=7)
    table = {**rulesets()["attnlrp"], "linear@patches": rule}
    cache = propagate(model, {"image": image}, lambda logits: logits[:, -1, 1], rules=table, names_filter=lambda _: True, audit=True)
    assert unexplained(cache) < 1e-12
    op = Convolution(model.patches.weight.detach(), model.patches.bias.detach(), stride=2)  # type: ignore[union-attr]
    (expected,) = back(op.compose({"linear": rule}) if not rule.is_plain else Scale(1.0), op, (image,), cache.coefficients["hook_pre"])
    assert expected is not None
    close(cache["hook_image"], image * expected, 1e-12)
    kept = cache["hook_pre"].flatten(1).sum(1) - cache["hook_image"].flatten(1).sum(1)
    biases = cache.conservation().groupby("example")["biases"].sum()
    assert biases.tolist() == pytest.approx((kept + model.out.bias[1].detach()).tolist())
