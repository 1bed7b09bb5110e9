"""The gamma rule on every linear layer, as for vision transformers: each layer against the dense formula, conservation, limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_relevance import RelevanceCache, logit_diff, propagate, rulesets
from lens_relevance.rules import GammaRule, Linear
from lens_relevance.sites import Site, anatomy
from tests.classifiers import build_classifier, inputs_for
from tests.engine.families import build, close, inputs_and_reference, unexplained, zero_all_that_keeps
from tests.precision import no_upcasts

MODEL = pytest.mark.parametrize("name", ["vit", "gpt2"])
TARGET = logit_diff(1, 2)


def with_gamma(gamma: float) -> dict[str, object]:
    """The ruleset of the documentation: AttnLRP with gamma on all linear layers."""
    return {**rulesets()["attnlrp"], "linear": GammaRule(gamma)}


def explained(name: str, gamma: float, bare: bool = False) -> tuple[RelevanceCache, list[Site]]:
    """A run with everything kept, and the model's linear layers."""
    model, inputs = (build("gpt2"), inputs_and_reference()[0]) if name == "gpt2" else (build_classifier("vit"), inputs_for("vit")[0])
    if bare:
        zero_all_that_keeps(model)
    with no_upcasts():
        cache = propagate(model, inputs, TARGET, rules=with_gamma(gamma), names_filter=lambda _: True, audit=True)
        assert torch.equal(cache.logits, model(inputs))
    return cache, [site for site in anatomy(model).sites if isinstance(site.operation, Linear)]


def dense(op: Linear, x: Tensor, y: Tensor, upstream: Tensor, gamma: float) -> Tensor:
    """Relevance of the inputs, contribution by contribution: [.., output, input] summed over outputs."""
    bias = torch.zeros_like(y) if op.bias is None else op.bias.expand_as(y)
    z = torch.cat([x.unsqueeze(-2) * op.weight, bias.unsqueeze(-1)], -1)
    z = z + gamma * torch.where(y.unsqueeze(-1) > 0, z.clamp(min=0), z.clamp(max=0))
    return (z / z.sum(-1, keepdim=True) * (y * upstream).unsqueeze(-1)).sum(-2)[..., :-1]


@MODEL
def test_every_linear_layer_of_a_model_has_the_dense_formula(name: str) -> None:
    cache, layers = explained(name, 0.25)
    mounts = {"q", "k", "v", "o", "in", "out", "unembed"}
    assert {site.mount for site in layers} == mounts and len(layers) == 13
    for site in layers:
        hook_in, hook_out = str(site.inputs[0].name), site.output_name
        assert isinstance(site.operation, Linear)
        x, y, upstream = (_flat(t) for t in (cache.activations[hook_in], cache.activations[hook_out], cache.coefficients[hook_out]))
        close(_flat(cache[hook_in]), dense(site.operation, x, y, upstream, 0.25), 1e-9)


def _flat(x: Tensor) -> Tensor:
    """Heads side by side, as linear layers see them."""
    return x.flatten(2) if x.ndim == 4 else x


@MODEL
def test_the_account_closes_and_gamma_keeps_nothing_but_biases(name: str) -> None:
    cache, _ = explained(name, 0.25)
    assert unexplained(cache) < 1e-9
    assert float(cache.conservation()["biases"].abs().max()) > 1e-3
    bare, _ = explained(name, 0.25, bare=True)
    assert unexplained(bare) < 1e-9
    assert float(bare.conservation()["biases"].abs().max()) < 1e-12


@MODEL
def test_gamma_zero_is_attnlrp_and_a_large_one_is_alpha_one_beta_zero(name: str) -> None:
    """As gamma grows, only contributions of the output's own sign are left: every output's relevance is shared among them alone."""
    none, layers = explained(name, 0.0)
    model, inputs = (build("gpt2"), inputs_and_reference()[0]) if name == "gpt2" else (build_classifier("vit"), inputs_for("vit")[0])
    with no_upcasts():
        plain = propagate(model, inputs, TARGET, rules="attnlrp")
    close(none.tokens(), plain.tokens(), 1e-9)
    large, _ = explained(name, 1e8)
    site = next(s for s in layers if s.name == "blocks.1.mlp.out")
    x, y, upstream = (
        large.activations[str(site.inputs[0].name)],
        large.activations[site.output_name],
        large.coefficients[site.output_name],
    )
    assert isinstance(site.operation, Linear) and site.operation.bias is not None
    z = torch.cat([x.unsqueeze(-2) * site.operation.weight, site.operation.bias.expand_as(y).unsqueeze(-1)], -1)
    own = torch.where(y.unsqueeze(-1) > 0, z.clamp(min=0), z.clamp(max=0))
    expected = (own / own.sum(-1, keepdim=True) * (y * upstream).unsqueeze(-1)).sum(-2)[..., :-1]
    close(large[str(site.inputs[0].name)], expected, 1e-6)
