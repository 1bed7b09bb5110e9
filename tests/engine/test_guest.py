"""The model is a guest: hooks, flags, modes, classes and logits as they were, whatever happened in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import RelevanceError, attach, propagate, random_tokens
from tests.engine.families import RULESETS, TARGET, build, inputs_and_reference, reference_for
from tests.models import build_gpt2

TOKENS, OTHER = inputs_and_reference()
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs")


def modules(model: TransformerBridge) -> list[nn.Module]:
    """Every module of the bridge and of what it wraps."""
    return list({id(m): m for root in (model, model.original_model) for m in root.modules()}.values())


def state(model: TransformerBridge) -> dict[str, Any]:
    """Everything about a model that a call could leave changed, in a form that compares."""
    points = {id(p): p for p in model.hook_dict.values()}.values()
    found = modules(model)
    parameters = [*nn.Module.parameters(model), *model.original_model.parameters()]
    with torch.no_grad():
        logits = model(TOKENS)
    return {
        "classes": [type(m) for m in found],
        "attributes": [sorted(m.__dict__) for m in found],
        "hooks": [[list(getattr(m, kind).items()) for kind in HOOKS if hasattr(m, kind)] for m in found],
        "lens_hooks": [(p.name, list(p.fwd_hooks), list(p.bwd_hooks), dict(p.ctx)) for p in points],
        "training": [m.training for m in found],
        "requires_grad": [p.requires_grad for p in parameters],
        "gradients": [p.grad is None for p in parameters],
        "values": [p.detach().clone() for p in parameters],
        "attention": getattr(getattr(model.original_model, "config", None), "_attn_implementation", None),
        "flags": {k: v for k, v in vars(model.cfg).items() if isinstance(v, bool | str | int | float)},
        "grad_enabled": torch.is_grad_enabled(),
        "logits": logits,
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key in ("logits", "values"):
            pairs = zip(before[key], after[key], strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), key
        else:
            assert before[key] == after[key], key


@pytest.fixture(params=["gpt2", "neox_parallel", "gemma2", "native_rotary"])
def guest(request: pytest.FixtureRequest) -> TransformerBridge:
    """A model with a habit of its own: some parameters frozen, a hook of each direction, one of them permanent."""
    model = build(request.param, torch.float32)
    for i, parameter in enumerate(model.original_model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
    model.hook_dict["blocks.0.hook_out"].add_hook(lambda x, hook: x * 1.5)
    model.hook_dict["blocks.1.hook_in"].add_perma_hook(lambda x, hook: None)
    model.hook_dict["blocks.1.hook_in"].add_hook(lambda g, hook: None, dir="bwd")
    return model


class Unhappy(Exception):
    pass


def unhappy(*_: Any, **__: Any) -> Tensor:
    raise Unhappy


def test_after_propagate(guest: TransformerBridge) -> None:
    before = state(guest)
    for rules in RULESETS:
        propagate(guest, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=rules in ("attnlrp", "deeplift"))
        propagate(guest, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), names_filter=lambda name: True)
    propagate(guest, TOKENS, TARGET, reference=random_tokens(2))
    same(before, state(guest))


def test_after_attach(guest: TransformerBridge) -> None:
    before = state(guest)
    for rules in RULESETS:
        with attach(guest, rules, reference=reference_for(rules, OTHER)):
            assert [p.requires_grad for p in guest.original_model.parameters()].count(True) > 0
            value = guest(TOKENS)[:, -1, 3].sum()
            value.backward(inputs=[next(p for p in guest.original_model.parameters() if p.requires_grad)])
    guest.zero_grad(set_to_none=True)
    for parameter in guest.original_model.parameters():
        parameter.grad = None
    same(before, state(guest))


def failing_hook(model: TransformerBridge) -> None:
    with model.hooks(fwd_hooks=[("blocks.1.attn.o.hook_in", unhappy)]):
        propagate(model, TOKENS, TARGET)


def interrupted(model: TransformerBridge) -> None:
    def stop(logits: Tensor) -> Tensor:
        raise KeyboardInterrupt

    propagate(model, TOKENS, stop)


def inside_attach(model: TransformerBridge) -> None:
    with attach(model, "attnlrp"):
        model(TOKENS)
        unhappy()


def reference_of_another_shape(model: TransformerBridge) -> None:
    with attach(model, "deeplift", reference=OTHER):
        model(TOKENS[:, :3])


TROUBLE: dict[str, tuple[type[BaseException], Callable[[TransformerBridge], object]]] = {
    "in the target": (Unhappy, lambda m: propagate(m, TOKENS, unhappy)),
    "in attach": (Unhappy, inside_attach),
    "in a user's hook": (Unhappy, failing_hook),
    "ctrl-c": (KeyboardInterrupt, interrupted),
    "unknown HookPoint": (RelevanceError, lambda m: propagate(m, TOKENS, TARGET, names_filter="blocks.0.hook_nothing")),
    "token outside": (RelevanceError, lambda m: propagate(m, TOKENS, lambda logits: logits[:, -1])),
    "reference": (RelevanceError, reference_of_another_shape),
    "nested": (RelevanceError, lambda m: _nested(m)),
    "train mode": (RelevanceError, lambda m: propagate(m.train(), TOKENS, TARGET)),
}


def _nested(model: TransformerBridge) -> None:
    with attach(model, "attnlrp"):
        propagate(model, TOKENS, TARGET)


@pytest.mark.parametrize("trouble", list(TROUBLE))
def test_after_trouble(guest: TransformerBridge, trouble: str) -> None:
    before = state(guest)
    expected, cause = TROUBLE[trouble]
    with pytest.raises(expected):
        cause(guest)
    guest.eval()
    same(before, state(guest))
    assert all(type(p) is HookPoint for p in guest.hook_dict.values())


@pytest.mark.parametrize("off", [torch.no_grad, lambda: torch.set_grad_enabled(False)], ids=["no_grad", "set_grad_enabled"])
def test_works_where_gradients_are_off(off: Callable[[], Any]) -> None:
    model = build_gpt2()
    expected = propagate(model, TOKENS, TARGET)
    for rules in ("attnlrp", "deeplift"):
        expected = propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=True)
        with off():
            cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=True)
            assert not torch.is_grad_enabled()
        assert torch.equal(cache.tokens(), expected.tokens()) and cache.tokens().abs().max() > 0
        assert not cache.tokens().requires_grad and not cache.logits.requires_grad and not cache.value.requires_grad
    with off(), attach(model, "attnlrp"):
        assert not model(TOKENS).requires_grad


@pytest.mark.parametrize("way", ["torch.compile", "compile", "forward"])
def test_a_compiled_model_is_refused(way: str) -> None:
    model = build_gpt2()
    if way == "compile":
        model.blocks[0].mlp.compile(backend="eager")
    elif way == "forward":
        model.original_model.forward = torch.compile(model.original_model.forward, backend="eager")
    given = torch.compile(model, backend="eager") if way == "torch.compile" else model
    with pytest.raises(RelevanceError, match=r"is compiled \(torch.compile\)"):
        propagate(given, TOKENS, TARGET)
    with pytest.raises(RelevanceError, match=r"is compiled \(torch.compile\)"), attach(given, "attnlrp"):
        pass


def test_inference_mode_is_refused() -> None:
    model = build_gpt2()
    with torch.inference_mode(), pytest.raises(RelevanceError, match="inference_mode"):
        propagate(model, TOKENS, TARGET)
    with torch.inference_mode(), pytest.raises(RelevanceError, match="inference_mode"), attach(model, "attnlrp"):
        pass


def test_a_users_hooks_are_part_of_the_model() -> None:
    """An ablation hung on the model is seen by relevance, and stays."""
    model = build_gpt2()
    plain = propagate(model, TOKENS, TARGET)
    model.hook_dict["blocks.1.attn.o.hook_in"].add_hook(lambda z, hook: z * 0)
    cache = propagate(model, TOKENS, TARGET)
    assert not torch.equal(cache.value, plain.value)
    everywhere = propagate(model, TOKENS, TARGET, names_filter="unembed.hook_out")
    assert torch.equal(everywhere.logits, model(TOKENS).detach())
    assert cache["blocks.1.attn.hook_z"].abs().max() == 0 and cache["blocks.0.attn.hook_z"].abs().max() > 0


def test_no_parameter_gets_a_gradient() -> None:
    model = build_gpt2()
    propagate(model, TOKENS, TARGET, audit=True)
    assert all(p.grad is None for p in model.original_model.parameters())


def test_graphs_free_themselves() -> None:
    """No tensor of a run outlives its cache."""
    import gc

    model = build_gpt2()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())  # isinstance would follow dead weak references

    propagate(model, TOKENS, TARGET, rules="deeplift", reference=OTHER)
    before = alive()
    for _ in range(3):
        propagate(model, TOKENS, TARGET, rules="deeplift", reference=OTHER, audit=True)
    assert alive() <= before
