"""Errors, and the model as it was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import Node, ablation, activation_patching, path_patching
from analyses.tasks import PromptPairs
from lens_relevance.inputs.targets import latent
from tests.analyses.patching.helpers import last_logit_diff, make_pairs


def test_errors(gpt2: TransformerBridge, unchanged: Callable[..., Any]) -> None:
    unchanged(gpt2)
    pairs = make_pairs()
    with pytest.raises(ValueError, match="unknown component 'residual'; there are resid"):
        activation_patching(gpt2, pairs, "residual")
    with pytest.raises(IndexError, match="no head 4, 'heads' of block 1 has 4"):
        activation_patching(gpt2, pairs, Node("z", 1, head=4))
    with pytest.raises(IndexError, match="no layer 2, the model has 2"):
        activation_patching(gpt2, pairs, Node("z", 2, head=0))
    with pytest.raises(IndexError, match="no position 6"):
        activation_patching(gpt2, pairs, Node("resid_pre", 0, 6))
    with pytest.raises(ValueError, match="name the head"):
        activation_patching(gpt2, pairs, Node("q", 0))
    with pytest.raises(ValueError, match="has no heads"):
        activation_patching(gpt2, pairs, Node("attn_out", 0, head=1))
    with pytest.raises(ValueError, match="chosen set"):
        activation_patching(gpt2, pairs, "neuron")
    with pytest.raises(ValueError, match="nothing to patch"):
        activation_patching(gpt2, pairs, [])
    with pytest.raises(ValueError, match="batch_size"):
        activation_patching(gpt2, pairs, "z", batch_size=0)
    with pytest.raises(ValueError, match=r"one value per example \[3\], got \(3, 50\)"):
        activation_patching(gpt2, pairs, "z", metric=lambda logits: logits[:, -1])
    with pytest.raises(ValueError, match="latent"):
        activation_patching(gpt2, pairs, "z", metric=latent("blocks.1.hook_resid_post", unit=0))
    with pytest.raises(ValueError, match="got str"):
        activation_patching(gpt2, pairs, "z", metric="logit_diff")


def test_unequal_lengths(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    shorter = pairs.clean_mask.clone()
    shorter[1, -1] = 0
    with pytest.raises(ValueError, match=r"unequal length or padded differently in pairs \[1\]"):
        activation_patching(gpt2, PromptPairs(pairs.clean, pairs.corrupt, pairs.target, shorter, pairs.corrupt_mask), "z")


def test_train_mode(gpt2: TransformerBridge) -> None:
    gpt2.original_model.train()
    for function in (partial(activation_patching, components="z"), ablation, partial(path_patching, senders="z", receivers="q")):
        with pytest.raises(ValueError, match="train mode; call model.eval"):
            function(gpt2, make_pairs())


def test_no_gap_is_reported(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    same = PromptPairs(pairs.clean, pairs.clean, pairs.target)
    with pytest.warns(UserWarning, match="same value on clean and corrupt in 3 of 3 pairs"):
        result = activation_patching(gpt2, same)
    assert result.effect.abs().max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        activation_patching(gpt2, pairs, "z")


def test_the_model_is_left_as_found(family: tuple[TransformerBridge, str], unchanged: Callable[..., Any]) -> None:
    model, _ = family
    pairs = make_pairs()
    with torch.no_grad():
        before = model(pairs.clean)
    unchanged(model)
    activation_patching(model, pairs, ["resid_pre", "z"], direction="mean")
    path_patching(model, pairs, Node("z", 0, head=0), receivers="q")
    calls = 0

    def breaks(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return last_logit_diff(logits)

    with pytest.raises(KeyboardInterrupt):
        activation_patching(model, pairs, "z", metric=breaks)
    with torch.no_grad():
        assert torch.equal(model(pairs.clean), before)
