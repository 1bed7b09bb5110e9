"""Activation patching gives the numbers of TransformerLens's own functions, and of whole patched runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformer_lens.patching as tl_patching
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import Node, activation_patching
from tests.analyses.patching.helpers import FAMILIES, TL_BY_POSITION, TL_FUNCTIONS, last_logit_diff, make_pairs, run_patched


def test_patched_equals_transformer_lens(family: tuple[TransformerBridge, str], unchanged: Callable[..., Any]) -> None:
    model, shortcut = family
    pairs = make_pairs()
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    unchanged(model)  # TransformerLens's first run wires hooks of its own
    for component, function in TL_FUNCTIONS.items():
        result = activation_patching(model, pairs, component)
        expected = function(model, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean())
        found = torch.tensor(result.grid(component, "patched").to_numpy(dtype="float32"))
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=0)
        assert result.effect.abs().max() > 1e-3, f"{component}: nothing was patched, the comparison means nothing"
        assert result.shortcut == shortcut


@pytest.mark.parametrize("name", ["gpt2", "llama", "native"])
def test_heads_by_position_equal_transformer_lens(name: str) -> None:
    model, pairs = FAMILIES[name][0](), make_pairs(n=2)
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    for component, function in TL_BY_POSITION.items():
        result = activation_patching(model, pairs, component, by_position=True)
        expected = function(model, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean()).detach()
        if component == "pattern":  # [layer, head, query]
            expected = expected.transpose(1, 2)
        found = torch.tensor(result.grid(component, "patched").to_numpy(dtype="float32"))
        torch.testing.assert_close(found, expected.flatten(1), atol=1e-5, rtol=0)
        assert result.effect.abs().max() > 1e-3


def test_per_pair_values_equal_transformer_lens(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    with torch.no_grad():
        _, clean = gpt2.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_attn_head_out_all_pos(gpt2, pairs.corrupt, clean, last_logit_diff, reduce="none", baseline=True)
    result = activation_patching(gpt2, pairs, "z")
    torch.testing.assert_close(result.patched, expected.values.flatten(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.effect, expected.effect().flatten(0, 1), atol=1e-5, rtol=0)


def test_neurons_equal_whole_patched_runs(family: tuple[TransformerBridge, str]) -> None:
    model, _ = family
    pairs = make_pairs()
    nodes = [Node("neuron", 0, neuron=4), Node("neuron", 1, neuron=0), Node("neuron", 1, 3, neuron=7), Node("neuron", 2, neuron=7)]
    result = activation_patching(model, pairs, nodes)
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    for node, found in zip(nodes, result.patched, strict=True):
        name = f"blocks.{node.layer}.mlp.hook_post"
        at = slice(None) if node.position is None else node.position

        def edit(value: Tensor, name: str = name, at: Any = at, neuron: int | None = node.neuron) -> Tensor:
            value[:, at, neuron] = clean[name][:, at, neuron]
            return value

        expected = last_logit_diff(run_patched(model, pairs.corrupt, name, edit))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (result.effect.abs().max(dim=1).values > 1e-6).all()
