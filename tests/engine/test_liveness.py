"""A rule that would do nothing is an error that names the HookPoint; a rule with nothing to do is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lens_relevance import CoverageError, LivenessError, RelevanceError, attach, logit, propagate, rulesets
from tests.engine.families import PAIRS, TARGET, build, close, inputs_and_reference, reference_for
from tests.models import build_gpt2, build_llama

TOKENS, OTHER = inputs_and_reference()
POINT = "blocks.0.mlp.out.hook_in"


def rewire(component: Any, forward: Callable[..., Tensor]) -> None:
    """Give one component of a bridge another forward, as a careless adapter might."""
    component.forward = forward


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
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference)
    assert "blocks.0.mlp" in str(caught.value)
    with pytest.raises(LivenessError, match=re.escape(POINT)), attach(model, rules, reference=reference):
        model(TOKENS)[:, -1, 3].sum().backward()


@pytest.mark.parametrize("rules", ["attnlrp", "cp_lrp", "deeplift"])
@pytest.mark.parametrize("careless", [decorative, half_decorative, dropped, twice])
@pytest.mark.parametrize("place", ["ln1.hook_out", "attn.hook_pattern", "attn.o.hook_in"])
def test_wherever_it_is(place: str, careless: Callable[..., Any], rules: str) -> None:
    """The same, one HookPoint at a time, by a HookPoint whose own call is careless."""
    model = build_gpt2()
    point = model.hook_dict[f"blocks.1.{place}"]
    inner = point.forward
    component = model.blocks[1]
    for part in place.split(".")[:-1]:
        component = getattr(component, part)
    name = place.rsplit(".", 1)[-1]

    class Careless(nn.Module):
        """Stands where the component calls its HookPoint; the HookPoint itself is as it was."""

        def __call__(self, x: Tensor) -> Tensor:
            if careless is dropped:
                return x
            y = point(x)
            return {decorative: x, half_decorative: (x + y) / 2, twice: y}[careless] if careless is not twice else point(y)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(point, attribute)

    component._modules.pop(name)
    object.__setattr__(component, name, Careless.__new__(Careless))
    del inner
    sites = model.hook_dict
    assert sites[f"blocks.1.{place}"] is point
    if rules == "attnlrp" and place == "attn.hook_pattern" and careless is not dropped:
        return  # the softmax keeps its plain gradient there; nothing stands at the pattern as an output
    with pytest.raises(LivenessError, match=re.escape(f"blocks.1.{place}")):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER))


@pytest.mark.parametrize("rules", list(rulesets()))
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


@pytest.mark.parametrize("rules", list(rulesets()))
def test_a_rule_off_every_path_passes(rules: str) -> None:
    model = build_gpt2()
    reference = reference_for(rules, OTHER)
    last = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, names_filter="blocks.1.hook_out")
    assert list(last) == ["blocks.1.hook_out"]  # asked for the end alone: the backward stops there
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda x, hook: torch.zeros_like(x))]):
        cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference)
    assert "blocks.1.attn.hook_z" not in cache and cache["blocks.0.attn.hook_z"].abs().max() > 0
    with (
        pytest.raises(RelevanceError, match="nothing flows"),
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_out", lambda x, hook: x * 0 + 1)]),
    ):
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
    close(
        propagate(model, TOKENS, TARGET, rules="gradient").tokens(),
        propagate(build("gpt2"), TOKENS, TARGET, rules="gradient").tokens(),
        1e-12,
    )


def test_decorative_points_cannot_be_asked_for() -> None:
    model = build("native_layer_norm")
    with pytest.raises(RelevanceError, match="decorative"):
        propagate(model, TOKENS, TARGET, names_filter="blocks.0.attn.hook_attn_scores")
    cache = propagate(model, TOKENS, TARGET, names_filter=lambda name: name.startswith("blocks.0.attn"))
    assert "blocks.0.attn.hook_attn_scores" not in cache and "blocks.0.attn.hook_pattern" in cache
    with pytest.raises(KeyError, match="decorative"):
        cache["blocks.0.attn.hook_attn_scores"]


class Opaque(nn.Module):
    """A component that no site is known for."""


def test_a_part_without_a_site_is_refused_by_name() -> None:
    """Attention that TransformerLens delegates to Hugging Face has no live scores."""
    from transformers import OPTConfig, OPTForCausalLM

    from tests.models import bridge_from_config

    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=32,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
        dropout=0.0,
    )
    model = bridge_from_config(OPTForCausalLM, config)
    try:
        cache = propagate(model, TOKENS, logit(3), rules="attnlrp")
    except CoverageError as error:
        assert "blocks.0.attn" in str(error) and "strict=False" in str(error)
        cache = propagate(model, TOKENS, logit(3), rules="attnlrp", strict=False)
    assert cache.tokens().abs().max() > 0


def test_a_twice_used_block_is_found() -> None:
    """A model that runs one component twice per forward: a rule cannot tell the calls apart."""
    model = build_llama()
    norm = model.blocks[1].ln2
    original = norm.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        norm.hook_in(args[0])
        return original(*args, **kwargs)

    norm.forward = forward
    with pytest.raises(LivenessError, match=re.escape("blocks.1.ln2.hook_in")):
        propagate(model, TOKENS, TARGET)


def test_pairs_are_named() -> None:
    assert set(PAIRS) == {name for name, table in rulesets().items() if any(rule.needs_reference for rule in _values(table))}


def _values(table: Any) -> Sequence[Any]:
    return list(table.values())
