"""A rule that would do nothing is an error that names the HookPoint; a rule with nothing to do is not.

The comparison with the sites is off where it would find the same first: tests/attacks has both together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_relevance import CoverageError, LivenessError, RelevanceError, attach, propagate, rulesets
from tests.engine.families import RULESETS, TARGET, build, close, inputs_and_reference, reference_for
from tests.models import build_gpt2, build_llama
from tests.wider_models import build_wider

TOKENS, OTHER = inputs_and_reference()
POINT = "blocks.0.mlp.out.hook_in"


def rewire(component: Any, forward: Callable[..., Tensor]) -> None:
    """Give one component of a bridge another forward, as a careless adapter might."""
    object.__setattr__(component, "forward", forward)  # a plain assignment would go to the wrapped module


def decorative(linear: Any) -> Callable[[Tensor], Tensor]:
    """The HookPoint fires, and what it returns is thrown away."""

    def forward(x: Tensor) -> Tensor:
        linear.hook_in(x)
        return linear.hook_out(linear.original_component(x))

    return forward


def half_decorative(linear: Any) -> Callable[[Tensor], Tensor]:
    """Half of what the model goes on with comes from the HookPoint."""

    def forward(x: Tensor) -> Tensor:
        return linear.hook_out(linear.original_component((linear.hook_in(x) + x) / 2))

    return forward


def dropped(linear: Any) -> Callable[[Tensor], Tensor]:
    """The HookPoint never fires."""

    def forward(x: Tensor) -> Tensor:
        return linear.hook_out(linear.original_component(x))

    return forward


def twice(linear: Any) -> Callable[[Tensor], Tensor]:
    """The HookPoint fires twice."""

    def forward(x: Tensor) -> Tensor:
        return linear.hook_out(linear.original_component(linear.hook_in(linear.hook_in(x))))

    return forward


@pytest.mark.parametrize("rules", ["attnlrp", "relp", "deeplift"])
@pytest.mark.parametrize("careless", [decorative, half_decorative, dropped, twice])
def test_a_careless_component_is_found(careless: Callable[..., Any], rules: str) -> None:
    model = build_gpt2()
    rewire(model.blocks[0].mlp.out, careless(model.blocks[0].mlp.out))
    reference = reference_for(rules, OTHER)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), build_gpt2()(TOKENS))  # nothing to see in the forward
    with pytest.raises(LivenessError, match=re.escape(POINT)) as caught:
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference, check=False)
    assert "blocks.0.mlp" in str(caught.value)
    with pytest.raises(LivenessError, match=re.escape(POINT)), attach(model, rules, reference=reference, check=False):
        model(TOKENS)[:, -1, 3].sum().backward()


@pytest.mark.parametrize("careless", [decorative, half_decorative, dropped, twice])
@pytest.mark.parametrize("rules", ["attnlrp", "gim", "deeplift"])
def test_a_careless_output_projection_is_found(rules: str, careless: Callable[..., Any]) -> None:
    """z is thrown away: the rule of the product pattern x values would be bypassed."""
    model = build_gpt2()
    rewire(model.blocks[1].attn.o, careless(model.blocks[1].attn.o))
    with pytest.raises(LivenessError, match=re.escape("blocks.1.attn.o.hook_in")):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), check=False)


@pytest.mark.parametrize("everything", [False, True], ids=["output", "everything"])
@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_a_careless_norm_is_found(rules: str, everything: bool) -> None:
    """The norm's bridge runs and fires its hooks, and the model goes on with the raw norm of its input, hooked or not."""
    model = build_gpt2()
    norm = model.blocks[1].ln2
    original = norm.forward

    def output_thrown_away(x: Tensor) -> Tensor:
        x = norm.hook_in(x)
        norm.hook_out(norm.original_component(x))
        return norm.original_component(x)

    def all_thrown_away(x: Tensor) -> Tensor:
        original(x)
        return norm.original_component(x)

    rewire(norm, all_thrown_away if everything else output_thrown_away)
    with pytest.raises(LivenessError, match=re.escape("blocks.1.ln2")):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), check=False)


@pytest.mark.parametrize("rules", RULESETS)
def test_a_gradient_that_is_legitimately_zero_passes(rules: str) -> None:
    """An MLP whose output weights are 0, a ReLU that is off everywhere, and attention that sees one key."""
    model = build_gpt2(activation_function="relu")
    with torch.no_grad():
        model.blocks[0].mlp.out.original_component.weight.zero_()
        getattr(model.blocks[1].mlp, "in").original_component.bias.fill_(-1000.0)
    cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER))
    assert cache["blocks.0.mlp.out.hook_in"].abs().max() == 0 and cache["blocks.1.mlp.out.hook_in"].abs().max() == 0
    assert cache.tokens().abs().max() > 0
    one = propagate(model, TOKENS[:, :1], TARGET, rules=rules, reference=reference_for(rules, OTHER[:, :1] * 0 + 9))
    assert one.tokens().abs().max() > 0


@pytest.mark.parametrize("rules", RULESETS)
def test_a_rule_off_every_path_passes(rules: str) -> None:
    model = build_gpt2()
    reference = reference_for(rules, OTHER)
    last = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, names_filter="blocks.1.hook_out")
    assert list(last) == ["blocks.1.hook_out"]  # asked for the end alone: the backward stops there
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda x, hook: torch.zeros_like(x))]):
        cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference)
    assert "blocks.1.attn.hook_z" not in cache and cache["blocks.0.attn.hook_z"].abs().max() > 0
    with pytest.raises(RelevanceError, match="nothing flows"):
        with model.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda x, hook: torch.ones_like(x))]):
            propagate(model, TOKENS, TARGET, rules=rules, reference=reference, names_filter="blocks.1.attn.hook_z")


@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_only_forwards_that_are_backpropagated_are_judged(rules: str) -> None:
    model = build_gpt2()
    rewire(model.blocks[0].mlp.out, decorative(model.blocks[0].mlp.out))
    with attach(model, rules, reference=reference_for(rules, OTHER)):
        assert torch.equal(model(TOKENS), build_gpt2()(TOKENS))


def test_a_decorative_point_under_a_plain_ruleset_is_no_error() -> None:
    """Where nothing is attached nothing can be lost."""
    model = build_gpt2(dtype=torch.float64)
    rewire(model.blocks[0].mlp.out, decorative(model.blocks[0].mlp.out))
    expected = propagate(build("gpt2"), TOKENS, TARGET, rules="gradient")
    close(propagate(model, TOKENS, TARGET, rules="gradient").tokens(), expected.tokens(), 1e-12)


def test_decorative_points_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an attention shows that nobody knows is no relevance."""
    model = build_wider("bert", torch.float32)
    monkeypatch.setattr("lens_relevance.sites.delegated_attention.ATTENTION", {})
    with pytest.raises(RelevanceError, match="decorative"):
        propagate(model, TOKENS, TARGET, rules="gradient", names_filter="blocks.0.attn.hook_attn_scores", strict=False)
    cache = propagate(model, TOKENS, TARGET, rules="gradient", names_filter=lambda name: name.startswith("blocks.0.attn"), strict=False)
    assert "blocks.0.attn.hook_attn_scores" not in cache and "blocks.0.attn.hook_z" in cache
    with pytest.raises(KeyError, match="decorative"):
        cache["blocks.0.attn.hook_attn_scores"]


def test_a_norm_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release whose norm computes something else must not give wrong numbers silently."""
    model = build_llama(dtype=torch.float64)
    norm = model.blocks[1].ln2.original_component
    monkeypatch.setattr(norm, "forward", lambda x: norm.weight * (x - x.mean(-1, keepdim=True)))
    with pytest.raises(CoverageError, match="blocks.1.ln2: LlamaRMSNorm computes neither"):
        propagate(model, TOKENS, TARGET, rules="attnlrp")


def test_a_component_none_of_whose_points_fire_is_found() -> None:
    """Its norm is called past all of its HookPoints."""
    model = build_llama()
    norm = model.blocks[1].ln2
    rewire(norm, norm.original_component)
    with pytest.raises(LivenessError, match="never fired.*blocks.1.ln2"):
        propagate(model, TOKENS, TARGET, rules="attnlrp", check=False)


def test_attention_that_nobody_knows_is_refused_and_has_its_plain_gradient_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that TransformerLens delegates to Hugging Face, of a family that is not registered."""
    model, known = build_wider("bert"), build_wider("bert")
    without = {name: rule for name, rule in rulesets()["attnlrp"].items() if name not in ("scores", "z")}
    expected = propagate(known, TOKENS, TARGET, rules=without)
    ruled = propagate(known, TOKENS, TARGET, rules="attnlrp")
    monkeypatch.setattr("lens_relevance.sites.delegated_attention.ATTENTION", {})
    with pytest.raises(CoverageError, match=r"2 component\(s\).*blocks.0.attn.*blocks.1.attn.*strict=False"):
        propagate(model, TOKENS, TARGET, rules="attnlrp")
    found = propagate(model, TOKENS, TARGET, rules="attnlrp", strict=False)
    close(found.tokens(), expected.tokens(), 1e-9)
    assert (found.tokens() - ruled.tokens()).abs().max() > 0.01 * ruled.tokens().abs().max()


def test_a_twice_used_block_is_found() -> None:
    """A model that runs one component twice per forward: a rule cannot tell the calls apart."""
    model = build_llama()
    norm = model.blocks[1].ln2
    original = norm.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        norm.hook_in(args[0])
        return original(*args, **kwargs)

    rewire(norm, forward)
    with pytest.raises(LivenessError, match=re.escape("blocks.1.ln2.hook_in")):
        propagate(model, TOKENS, TARGET)
