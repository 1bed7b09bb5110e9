"""What patched runs skip, and families and hooks where they cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformer_lens.patching as tl_patching
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import BertConfig, BertForMaskedLM, GPTJConfig, GPTJForCausalLM, GraniteConfig, GraniteForCausalLM

from analyses.patching import Node, activation_patching
from analyses.patching.checks import SAMPLES
from tests import models
from tests.analyses.patching.helpers import FAMILIES, last_logit_diff, make_pairs, run_patched


@pytest.mark.parametrize("name", [name for name, (_, shortcut) in FAMILIES.items() if shortcut == "position"])
def test_the_last_block_runs_only_where_logits_are_read(name: str) -> None:
    """After the first, whole runs its MLP sees one position, and the unembedding, which reads two tokens, is not called at all."""
    model, pairs = FAMILIES[name][0](), make_pairs()
    seen: list[int] = []
    calls: list[int] = []
    handles = [
        model.blocks[-1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1])),
        model.unembed.register_forward_hook(lambda module, args, output: calls.append(output.shape[1])),
    ]
    try:
        activation_patching(model, pairs, ("resid_pre", "v"), by_position=True)
    finally:
        for handle in handles:
            handle.remove()
    assert set(seen[-3:]) == {1} and set(seen[:2]) == {6}
    assert calls == [6] * len(calls) and len(calls) == 2 + SAMPLES  # both runs, and the samples on which the shortcut is tried


def test_keys_and_values_of_the_last_block_are_patched_at_every_position(gpt2: TransformerBridge) -> None:
    """Its earlier positions give nothing else."""
    pairs = make_pairs()
    last = len(gpt2.blocks) - 1
    result = activation_patching(gpt2, pairs, [Node("v", last, position, 1) for position in range(2, 6)] + [Node("q", last, 3, 1)])
    with torch.no_grad():
        _, clean = gpt2.run_with_cache(pairs.clean)
    for number, node in enumerate(result.nodes):

        def edit(value: Tensor, node: Node = node) -> Tensor:
            value[:, node.position, 1] = clean[f"blocks.{last}.attn.hook_{node.component}"][:, node.position, 1]
            return value

        expected = last_logit_diff(run_patched(gpt2, pairs.corrupt, f"blocks.{last}.attn.hook_{node.component}", edit))
        torch.testing.assert_close(result.patched[number], expected, atol=1e-5, rtol=0)
    assert result.effect[:4].abs().max() > 1e-3 and result.effect[4].abs().max() < 1e-6


def test_a_bidirectional_model_is_run_whole() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, max_position_embeddings=32
    )
    model, pairs = models.bridge_from_config(BertForMaskedLM, config), make_pairs(changed=(2, 5))
    result = activation_patching(model, pairs, "z", by_position=True)
    assert result.shortcut == "none"
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    number = result.nodes.index(Node("z", 0, 1, 2))

    def edit(value: Tensor) -> Tensor:
        value[:, 1, 2] = clean["blocks.0.attn.hook_z"][:, 1, 2]
        return value

    expected = last_logit_diff(run_patched(model, pairs.corrupt, "blocks.0.attn.hook_z", edit))
    torch.testing.assert_close(result.patched[number], expected, atol=1e-5, rtol=0)
    assert result.effect[number].abs().max() > 1e-5, "position 1 holds the same token in both prompts, but sees the others"


def test_scaled_logits() -> None:
    config = GraniteConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        residual_multiplier=0.5, logits_scaling=3.0, pad_token_id=0,
    )  # fmt: skip
    patched_like_transformer_lens(models.bridge_from_config(GraniteForCausalLM, config))


def test_soft_capped_logits() -> None:
    """A cap of 4 where logits reach further, after the unembedding and outside of any module."""
    model = models.build_gemma2()
    with torch.no_grad(), model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: reached.append(float(x.abs().max())))]):
        reached: list[float] = []
        assert float(model(make_pairs().clean).abs().max()) < 4 < reached[0]
    patched_like_transformer_lens(model)


def patched_like_transformer_lens(model: TransformerBridge) -> None:
    pairs = make_pairs()
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_attn_out(model, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean())
    result = activation_patching(model, pairs, "attn_out")
    assert result.shortcut == "position"
    torch.testing.assert_close(torch.tensor(result.grid("attn_out", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)


def test_a_dead_pattern_is_refused(gpt2: TransformerBridge) -> None:
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    model = models.bridge_from_config(GPTJForCausalLM, config)
    with pytest.raises(ValueError, match="pattern of block 0 is shown but not used"):
        activation_patching(model, make_pairs(), "pattern")
    assert activation_patching(gpt2, make_pairs(), "pattern").effect.abs().max() > 1e-3


def test_hooks_of_the_user_count(gpt2: TransformerBridge) -> None:
    """A head that the user has switched off stays off, and no positions are skipped: the user's hook may count them."""
    pairs = make_pairs()

    def off(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 1, 2] = 0
        return value

    plain = activation_patching(gpt2, pairs, "mlp_out")
    with gpt2.hooks(fwd_hooks=[("blocks.0.attn.hook_z", off)]):
        result = activation_patching(gpt2, pairs, "mlp_out")
        with torch.no_grad():
            _, clean = gpt2.run_with_cache(pairs.clean)
        expected = tl_patching.get_act_patch_mlp_out(gpt2, pairs.corrupt, clean, lambda logits: last_logit_diff(logits).mean())
    assert (plain.shortcut, result.shortcut) == ("position", "layer")
    torch.testing.assert_close(torch.tensor(result.grid("mlp_out", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(result.patched, plain.patched, atol=1e-4)
