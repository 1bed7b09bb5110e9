"""Edits by hooks inside norms: `hook_scale` and `hook_normalized` frozen, scaled, set to zero, in every family.

Where the bridge computes a norm by Hugging Face's own module, these points are a side branch until a forward hook edits them: then the
model goes on with what the hook returned, and the rules have to follow. Freezing the scales of LayerNorm is the usual reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from analyses.benchmarks.tiny_models import FAMILIES, MORE, VARIANTS, build
from lens_relevance import RelevanceError, propagate
from lens_relevance.coverage_table import random_inputs, target_for
from lens_relevance.inputs.prompt import read_inputs
from lens_relevance.rules import LNRule
from tests.engine.families import close, reference_for, unexplained, whole
from tests.precision import no_upcasts

Hooks = list[tuple[str, Callable[..., Any]]]
PARTLY_COVERED = ("mamba", "qwen2_moe")
DECORATIVE = ("t5", "mt5", "flan_t5")  # their norms' inner points hold statistics that the model does not compute with
WEIGHTLESS = ("olmo",)  # TransformerLens itself cannot go on from a norm without a weight whose inner points are edited
FOLLOWED = [name for name in FAMILIES | MORE | VARIANTS if name not in (*PARTLY_COVERED, *DECORATIVE, *WEIGHTLESS, "native_no_norm")]
SEVERAL = ["gpt2", "llama", "bert", "deepseek_v3"]  # the bridge's own norm, RMSNorm, LayerNorm, norms of latents


def norms(model: TransformerBridge) -> list[str]:
    found = [str(module.hook_in.name) for module in model.modules() if isinstance(module, NormalizationBridge)]
    return [name.removesuffix(".hook_in") for name in dict.fromkeys(found)]


def output(model: TransformerBridge, inputs: Any) -> Tensor:
    found = read_inputs(model, inputs).call(model)
    return getattr(found, "logits", found)


def frozen(model: TransformerBridge, norms: Sequence[str], other: Any) -> Hooks:
    """Scales held at what they are on another prompt."""
    held: dict[str, Tensor] = {}

    def note(x: Tensor, hook: Any) -> None:
        held[hook.name] = x.detach().clone()

    with torch.no_grad(), model.hooks(fwd_hooks=[(f"{name}.hook_scale", note) for name in norms]):
        output(model, other)
    return [(name, lambda x, hook: held[hook.name]) for name in held]


def scaled(model: TransformerBridge, norms: Sequence[str], other: Any) -> Hooks:
    """Both points, by different factors."""
    return [(f"{n}.{point}", lambda x, hook, f=f: f * x) for n in norms for point, f in (("hook_scale", 1.3), ("hook_normalized", 0.8))]


def zeroed(model: TransformerBridge, norms: Sequence[str], other: Any) -> Hooks:
    """Every third feature."""
    return [(f"{name}.hook_normalized", lambda x, hook: x * (torch.arange(x.shape[-1]) % 3 > 0)) for name in norms]


def mixed(model: TransformerBridge, norms: Sequence[str], other: Any) -> Hooks:
    """All of them, each at other norms."""
    return [hook for i, edit in enumerate((frozen, zeroed, scaled)) for hook in edit(model, norms[i::3], other)]


def case(family: str) -> tuple[TransformerBridge, Any, Any]:
    model = build(family)
    return model, *(random_inputs(model, 2, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale:UserWarning")
@pytest.mark.parametrize(
    "family, edit",
    [*((family, mixed) for family in FOLLOWED), *((family, edit) for family in SEVERAL for edit in (frozen, scaled, zeroed))],
)
def test_edits_inside_norms_are_followed(family: str, edit: Callable[..., Hooks]) -> None:
    """Logits are those of the hooked model, the account closes, pair rules add up; plain gradients are autograd's through the hooks."""
    with no_upcasts():
        model, inputs, other = case(family)
        target, hooks = target_for(model), edit(model, norms(model), other)
        plain = output(model, inputs).detach()
        with model.hooks(fwd_hooks=hooks):
            edited = output(model, inputs).detach()
            assert float((edited - plain).abs().max()) > 1e-3
            for rules in ("gradient", "deeplift") if edit is mixed else ("gradient", "attnlrp", "deeplift"):
                cache = propagate(model, inputs, target, rules=rules, reference=reference_for(rules, other), audit=True)
                logits = cache.logits.flatten(1)
                assert float((logits - edited.flatten(1)[:, -logits.shape[1] :]).abs().max()) < 1e-12 * float(edited.abs().max())
                assert float(whole(cache).abs().min()) > 1e-3 and unexplained(cache) < 1e-10
                if rules == "deeplift":  # the hooks do the same to both runs, linearly, so that nothing stays with them
                    assert float(cache.conservation()["edits"].abs().max()) < 1e-10


@pytest.mark.parametrize("family", DECORATIVE)
@pytest.mark.parametrize("edit", [frozen, zeroed])
def test_edits_that_the_model_does_not_take_are_refused(family: str, edit: Callable[..., Hooks]) -> None:
    model, inputs, other = case(family)
    with model.hooks(fwd_hooks=edit(model, norms(model)[1:2], other)), pytest.raises(RelevanceError, match="is decorative on this model"):
        propagate(model, inputs, target_for(model), rules="attnlrp")


@pytest.mark.parametrize("family", WEIGHTLESS)
def test_a_norm_without_a_weight_takes_no_edits_at_all(family: str) -> None:
    model, inputs, other = case(family)
    with model.hooks(fwd_hooks=scaled(model, norms(model), other)), pytest.raises(AttributeError, match="no attribute 'weight'"):
        output(model, inputs)


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale:UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_scale_of_zero_is_refused(family: str) -> None:
    model, inputs, other = case(family)
    with model.hooks(fwd_hooks=[(f"{norms(model)[1]}.hook_scale", lambda x, hook: 0 * x)]):
        for rules in ("attnlrp", "deeplift"):
            with pytest.raises(RelevanceError, match="target is (nan|inf)"):
                propagate(model, inputs, target_for(model), rules=rules, reference=reference_for(rules, other))


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale:UserWarning")
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel", "opt"])
def test_frozen_scales_under_the_gradient_are_the_ln_rule(family: str) -> None:
    """A scale that a hook holds at its own value is a constant, which is what the LN-rule makes of it (Ali et al. 2022)."""
    with no_upcasts():
        model, inputs, _ = case(family)
        ruled = propagate(model, inputs, target_for(model), rules={"norm": LNRule()})
        with model.hooks(fwd_hooks=frozen(model, norms(model), inputs)):
            held = propagate(model, inputs, target_for(model), rules="gradient")
        plain = propagate(model, inputs, target_for(model), rules="gradient")
    close(held.tokens(), ruled.tokens(), 1e-10)
    assert float((plain.tokens() - ruled.tokens()).abs().max()) > 1e-2 * float(ruled.tokens().abs().max())
