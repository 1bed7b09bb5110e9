"""recompute=True on a length at which attention is computed for some query rows at a time: equal to the plain run up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lens_relevance import RelevanceCache, RelevanceError, latent, logit_diff, propagate, random_tokens
from lens_relevance.hooks import attention_by_rows as by_rows
from lens_relevance.rules import attention_by_rows as rows
from lens_relevance.rules.attention_by_rows import AttentionByRows
from tests import models
from tests.engine.families import build, exact
from tests.wider_models import build_wider

POSITIONS = 21
TARGET = logit_diff(7, 11)
LIVE = ["gpt2", "neox_parallel", "neox_sequential", "llama", "qwen3", "gemma2", "olmo2"]
GROUPS = ("activations", "coefficients", "reference_activations", "averaged")


def tokens(seed: int, batch: int = 2) -> Tensor:
    """Prompts that share their first token."""
    drawn = models.random_tokens(batch, POSITIONS, seed=seed)
    drawn[:, 0] = 0
    return drawn


@pytest.fixture(autouse=True)
def _short_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "AT_ONCE", 0)
    monkeypatch.setattr(rows, "ROWS", 4)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[tuple[slice, slice]]:
    """The query rows and keys that attention was computed for at a time."""
    seen, original = list[tuple[slice, slice]](), AttentionByRows.pieces

    def noted(self: AttentionByRows, q: Tensor) -> Iterator[tuple[slice, slice]]:
        for piece in original(self, q):
            seen.append(piece)
            yield piece

    monkeypatch.setattr(AttentionByRows, "pieces", noted)
    return seen


def compare(model: Any, inputs: Tensor, target: Any, rules: str, *, tolerance: float, **options: Any) -> RelevanceCache:
    """The run at once, and the one by rows; each tensor equal relative to its largest entry."""
    expected, actual = (propagate(model, inputs, target, rules=rules, recompute=flag, **options) for flag in (False, True))
    for group in GROUPS:
        one, other = getattr(expected, group), getattr(actual, group)
        assert list(one) == list(other), group
        for name in one:
            largest = float(one[name].abs().max())
            assert float((one[name] - other[name]).abs().max()) <= tolerance * largest, (rules, group, name)
    assert float((expected.logits - actual.logits).abs().max()) <= tolerance * float(expected.logits.abs().max())
    assert float(expected.tokens().abs().sum()) > 0
    return actual


@pytest.mark.parametrize("family", LIVE)
def test_equal_to_the_plain_run(family: str, pieces: list[tuple[slice, slice]]) -> None:
    model = build(family, torch.float64, n_layers=3)
    with exact(family):
        for rules in ("attnlrp", "gim", "cp_lrp", "deeplift"):
            pieces.clear()
            compare(model, tokens(0), TARGET, rules, tolerance=1e-10, reference=tokens(1) if rules == "deeplift" else None)
            assert {piece[0].stop - piece[0].start for piece in pieces} == {4, 1}
            assert any(keys.stop - keys.start < POSITIONS for _, keys in pieces)


@pytest.mark.parametrize("family", LIVE)
def test_equal_in_float32(family: str) -> None:
    model = build(family, torch.float32, n_layers=3)
    compare(model, tokens(0), TARGET, "attnlrp", tolerance=1e-4)
    compare(model, tokens(0), TARGET, "deeplift", tolerance=1e-4, reference=tokens(1))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hidden=st.integers(0, POSITIONS - 2), n=st.integers(1, 3), size=st.integers(1, POSITIONS), pair=st.booleans())
def test_equal_with_padding_and_several_references(
    family: str, monkeypatch: pytest.MonkeyPatch, hidden: int, n: int, size: int, pair: bool
) -> None:
    monkeypatch.setattr(rows, "ROWS", size)
    model, mask = build(family, torch.float32, n_layers=2), torch.ones_like(tokens(0))
    mask[0, :hidden] = 0
    rules = "deeplift" if pair else "attnlrp"
    compare(model, tokens(0), TARGET, rules, tolerance=1e-4, attention_mask=mask, reference=random_tokens(n) if pair else None)


def test_a_sliding_window_needs_few_keys(pieces: list[tuple[slice, slice]]) -> None:
    model = build("gemma2", torch.float32, n_layers=2)
    compare(model, tokens(0), TARGET, "attnlrp", tolerance=1e-4)
    windows = [layer.self_attn.sliding_window for layer in model.original_model.model.layers]
    assert {w for w in windows if w is not None and w < POSITIONS}, "no layer has a window"
    assert any(keys.start > 0 for _, keys in pieces)


def test_sinks_of_a_mixture_of_experts() -> None:
    model = build_wider("gpt_oss", torch.float32)
    compare(model, tokens(0), TARGET, "attnlrp", tolerance=1e-4)


def test_a_target_inside_the_model() -> None:
    model = build("llama", torch.float32, n_layers=4)
    compare(model, tokens(0), latent("blocks.2.hook_out", unit=1), "deeplift", tolerance=1e-4, reference=tokens(1))


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"])
def test_who_asks_for_scores_or_pattern_gets_them_at_once(name: str, pieces: list[tuple[slice, slice]]) -> None:
    model = build("llama", torch.float32, n_layers=3)
    whole = propagate(model, tokens(0), TARGET, rules="attnlrp", names_filter=name)
    found = propagate(model, tokens(0), TARGET, rules="attnlrp", names_filter=name, recompute=True)
    assert len(pieces) > 0  # of the other layers
    assert found[name].shape == (2, model.cfg.n_heads, POSITIONS, POSITIONS)
    assert float((found[name] - whole[name]).abs().max()) <= 1e-4 * float(whole[name].abs().max())


def test_a_hook_on_the_pattern_acts() -> None:
    model = build("llama", torch.float32, n_layers=3)
    plain = propagate(model, tokens(0), TARGET, rules="attnlrp")
    with model.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: x * 0.5), ("blocks.2.attn.hook_z", lambda x, hook: x + 0.1)]):
        edited = compare(model, tokens(0), TARGET, "attnlrp", tolerance=1e-4)
    assert float((edited.logits - plain.logits).abs().max()) > 1e-3


def test_a_component_that_computes_something_else_is_refused_and_the_model_left_as_found() -> None:
    model = build("llama", torch.float32, n_layers=3)
    attention = model.blocks[1].attn
    original = attention._masked_softmax
    attention.__dict__["_masked_softmax"] = lambda *args, **kwargs: original(*args, **kwargs) * 0.9
    found = dict(vars(attention))
    with pytest.raises(RelevanceError, match="does not compute what its site says"):
        propagate(model, tokens(0), TARGET, rules="attnlrp", recompute=True)
    assert vars(attention).keys() == found.keys()
    assert not attention.hook_pattern.has_hooks()


def test_short_contexts_are_computed_at_once(monkeypatch: pytest.MonkeyPatch, pieces: list[tuple[slice, slice]]) -> None:
    model = build("llama", torch.float32, n_layers=3)
    monkeypatch.setattr(by_rows, "AT_ONCE", 2 * model.cfg.n_heads * POSITIONS**2)
    compare(model, tokens(0), TARGET, "deeplift", tolerance=0.0, reference=tokens(1))
    assert not pieces
