"""Attention computed without its HookPoints: its steps are recomputed at them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_relevance import MismatchError, RelevanceError, attach, propagate
from lens_relevance.hooks.checks import refuse_mismatch, surely_near
from lens_relevance.hooks.recomputation import _off
from lens_relevance.sites.families import ATTENTION
from tests.engine.families import TARGET, build, close, inputs_and_reference, reference_for
from tests.wider_models import build_wider

SCORES, PATTERN, Z = "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"
DELEGATED = ("opt", "gptj", "bert")


def build_any(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return build_wider(family, dtype) if family in DELEGATED else build(family, dtype)


@pytest.mark.parametrize("family", [*DELEGATED, "native_rotary"])
@pytest.mark.parametrize("rules", ["gradient", "attnlrp", "gim", "deeplift"])
def test_coefficients_at_the_pattern_are_those_of_its_product_with_the_values(family: str, rules: str) -> None:
    """g_A[t, s] = part * g_z[t] . v[s], v the mean of both runs under pair rules; rows of the pattern sum to 1."""
    model, (tokens, other) = build_any(family), inputs_and_reference()
    cache = propagate(
        model,
        tokens,
        TARGET,
        rules=rules,
        names_filter=[SCORES, PATTERN, Z, "blocks.1.attn.v.hook_out"],
        reference=reference_for(rules, other),
    )
    v, part = cache.activations["blocks.1.attn.v.hook_out"], 0.5 if rules in ("attnlrp", "gim") else 1.0
    if rules == "deeplift":
        v = (v + cache.reference_activations["blocks.1.attn.v.hook_out"]) / 2
    close(cache.activations[PATTERN].sum(-1), torch.ones(2, 4, 6, dtype=v.dtype), 1e-6)
    expected = part * torch.einsum("bthd,bshd->bhts", cache.coefficients[cache.canonical(Z)], v)
    hidden = cache.activations[PATTERN] == 0
    close(cache.coefficients[PATTERN].masked_fill(hidden, 0), expected.masked_fill(hidden, 0), 1e-10)
    assert bool(torch.isfinite(cache[SCORES]).all()) and float(cache[SCORES].abs().max()) > 0


@pytest.mark.parametrize("family", DELEGATED)
def test_under_the_plain_gradient_the_rebuilt_steps_are_the_models_own(family: str) -> None:
    model, (tokens, _) = build_any(family), inputs_and_reference()
    ours = propagate(model, tokens, TARGET, rules="gradient", names_filter=["blocks.0.hook_in"])
    x: list[Tensor] = []

    def leaf(t: Tensor, hook: Any) -> Tensor:
        x.append(t.detach().requires_grad_(True))
        return x[0]

    with model.hooks(fwd_hooks=[("blocks.0.hook_in", leaf)]):
        logits = model(tokens)
    (gradient,) = torch.autograd.grad((logits[:, -1, 7] - logits[:, -1, 11]).sum(), x)
    close(ours.coefficients["blocks.0.hook_in"], gradient, 1e-6)


def test_tools_find_the_rebuilt_pattern_once_and_on_the_graph() -> None:
    model, (tokens, _) = build_any("bert"), inputs_and_reference()
    seen: list[Tensor] = []
    with attach(model, "attnlrp"), model.hooks(fwd_hooks=[(PATTERN, lambda t, hook: seen.append(t))]):
        model(tokens)
    assert len(seen) == 1 and seen[0].requires_grad
    plain = model.run_with_cache(tokens)[1][PATTERN]
    close(seen[0].detach(), plain, 1e-6)


def test_an_edit_of_a_rebuilt_pattern_is_refused() -> None:
    """The model would go on without it."""
    model, (tokens, _) = build_any("opt"), inputs_and_reference()
    with attach(model, "attnlrp"), pytest.raises(RelevanceError, match="hook_pattern.*edit would be lost"):
        model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, lambda t, hook: t * 2)])


@pytest.mark.parametrize("rules", ["gradient", "cp_lrp", "deeplift"])
def test_a_module_that_computes_something_else_is_refused(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new release that changes, say, the scale must not give wrong numbers silently."""
    model, (tokens, other) = build_any("bert"), inputs_and_reference()
    module = model.blocks[1].attn.original_component.self
    monkeypatch.setattr(module, "scaling", module.scaling * 0.9)
    monkeypatch.setitem(ATTENTION, "BertAttention", replace(ATTENTION["BertAttention"], scale=lambda module: 0.5))
    with pytest.raises(MismatchError, match="blocks.1.attn:z does not compute"):
        propagate(model, tokens, TARGET, rules=rules, reference=reference_for(rules, other))


def test_what_is_surely_near_is_near_in_every_row() -> None:
    """The bound never passes what the comparison row by row would refuse, whatever a row's size, padding or NaN."""
    generator, passed = torch.Generator().manual_seed(0), 0
    for i in range(300):
        value = torch.randn(3, 5, 8, generator=generator) * 10 ** torch.randn(3, 5, 1, generator=generator)
        result = value * (1 + 10 ** (-3 - i % 6) * torch.randn(3, 5, 8, generator=generator))
        if i % 4 == 0:
            value[0, :2] = 0  # padding
        if i % 7 == 0:
            result[1, 1, 1] = float("nan") if i % 2 else float("inf")
        if surely_near(result, value):
            refuse_mismatch(_off(result, value), result.dtype, "")
            passed += 1
    assert passed > 50
