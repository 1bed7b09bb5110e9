"""Mixtures of experts, sinks and latent attention: HookPoints that do nothing are found there too.

The comparison with the sites is off where it would find the same first: tests/attacks has both together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_relevance import LivenessError, propagate
from tests.engine.families import TARGET, close, inputs_and_reference, reference_for
from tests.engine.test_liveness import decorative, dropped, rewire, twice
from tests.wider_models import MIXTURES, build_wider

TOKENS, OTHER = inputs_and_reference()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def careless_mixture(how: str, mlp: Any) -> Callable[[Tensor], Any]:
    """A component that runs its module past one of its HookPoints."""

    def forward(x: Tensor) -> Any:
        hooked = x if how == "dropped input" else mlp.hook_in(x)
        inner = mlp.hook_in(hooked) if how == "input fires twice" else x if how == "decorative input" else hooked
        output = mlp.original_component(inner)
        shown = _first(output) if how == "dropped output" else mlp.hook_out(_first(output))
        y = _first(output) if how == "decorative output" else shown
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return forward


@pytest.mark.parametrize("how", ["dropped input", "input fires twice", "decorative output", "dropped output"])
@pytest.mark.parametrize("family", MIXTURES)
def test_a_careless_mixture_is_found(family: str, how: str) -> None:
    rules = "deeplift" if family in ("mixtral", "deepseek_v3") else "attnlrp"
    model = build_wider(family, torch.float32)
    rewire(model.blocks[1].mlp, careless_mixture(how, model.blocks[1].mlp))
    with torch.no_grad():
        assert torch.equal(model(TOKENS), build_wider(family, torch.float32)(TOKENS))  # nothing to see in the forward
    with pytest.raises(LivenessError, match=re.escape("blocks.1.mlp")):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), check=False)


@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_a_mixture_is_recomputed_so_that_a_decorative_input_leaves_the_numbers_right(rules: str) -> None:
    """All of its backward is the rule's own; but an edit there, which the model does not follow, is refused."""
    model, reference = build_wider("mixtral", torch.float32), reference_for(rules, OTHER)
    expected = propagate(model, TOKENS, TARGET, rules=rules, reference=reference).tokens()
    rewire(model.blocks[1].mlp, careless_mixture("decorative input", model.blocks[1].mlp))
    close(propagate(model, TOKENS, TARGET, rules=rules, reference=reference).tokens(), expected, 1e-6)
    edited = ("blocks.1.mlp.hook_in", lambda x, hook: x * 1.2)
    with model.hooks(fwd_hooks=[edited]), pytest.raises(LivenessError, match="mixture of experts does not compute"):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference, check=False)


@pytest.mark.parametrize("careless", [decorative, dropped, twice])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_careless_output_projection_is_found(family: str, careless: Callable[..., Any]) -> None:
    model = build_wider(family, torch.float32)
    rewire(model.blocks[1].attn.o, careless(model.blocks[1].attn.o))
    with pytest.raises(LivenessError, match=re.escape("blocks.1.attn.o.hook_in")):
        propagate(model, TOKENS, TARGET, rules="attnlrp", check=False)


@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_a_careless_norm_inside_latent_attention_is_found(rules: str) -> None:
    model = build_wider("deepseek_v3", torch.float32)
    norm = model.blocks[0].attn.kv_a_layernorm

    def thrown_away(x: Tensor) -> Tensor:
        x = norm.hook_in(x)
        norm.hook_out(norm.original_component(x))
        return norm.original_component(x)

    rewire(norm, thrown_away)
    with pytest.raises(LivenessError, match=re.escape("blocks.0.attn.kv_a_layernorm")):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), check=False)


@pytest.mark.parametrize("rules", ["cp_lrp", "attnlrp", "deeplift"])
def test_an_edit_of_the_routers_weights_is_refused(rules: str) -> None:
    """The rule recomputes the experts with the router's own weights."""
    model = build_wider("mixtral", torch.float32)
    edited = ("blocks.0.mlp.gate.hook_expert_weights", lambda weights, hook: weights * 1.2)
    with model.hooks(fwd_hooks=[edited]), pytest.raises(LivenessError, match="mixture of experts.*router's weights"):
        propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), check=False)
