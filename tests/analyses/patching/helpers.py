"""Families, pairs and whole patched runs: what the tests of patching compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformer_lens.patching as tl_patching
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks import PromptPairs
from lens_relevance.inputs.targets import logit_diff
from tests import models

FAMILIES: dict[str, tuple[Callable[[], TransformerBridge], str]] = {
    "gpt2": (partial(models.build_gpt2, n_layers=3), "position"),
    "neox_parallel": (partial(models.build_neox, parallel=True, n_layers=3), "position"),
    "neox_sequential": (partial(models.build_neox, parallel=False, n_layers=3), "position"),
    "llama": (partial(models.build_llama, n_layers=3), "position"),
    "native": (partial(models.build_native, n_layers=3), "layer"),
    "native_gqa_rotary": (partial(models.build_native, n_layers=3, n_key_value_heads=2, positional_embedding_type="rotary"), "layer"),
    "native_soft_caps": (partial(models.build_native, n_layers=3, attn_scores_soft_cap=2.0, output_logits_soft_cap=4.0), "layer"),
}
"""Families, and what a patched run may skip there."""

TL_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "resid_pre": tl_patching.get_act_patch_resid_pre,
    "attn_out": tl_patching.get_act_patch_attn_out,
    "mlp_out": tl_patching.get_act_patch_mlp_out,
    "z": tl_patching.get_act_patch_attn_head_out_all_pos,
    "q": tl_patching.get_act_patch_attn_head_q_all_pos,
    "k": tl_patching.get_act_patch_attn_head_k_all_pos,
    "v": tl_patching.get_act_patch_attn_head_v_all_pos,
    "pattern": tl_patching.get_act_patch_attn_head_pattern_all_pos,
}
TL_BY_POSITION: dict[str, Callable[..., Tensor]] = {
    "z": tl_patching.get_act_patch_attn_head_out_by_pos,
    "k": tl_patching.get_act_patch_attn_head_k_by_pos,
    "pattern": tl_patching.get_act_patch_attn_head_pattern_by_pos,
}


def last_logit_diff(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 5]


def make_pairs(n: int = 3, pos: int = 6, changed: tuple[int, ...] = (2, 3), target: Any = last_logit_diff, **masks: Tensor) -> PromptPairs:
    """Random pairs that differ at the positions `changed`."""
    clean, corrupt = models.random_tokens(n, pos, seed=1), models.random_tokens(n, pos, seed=1)
    for position in changed:
        corrupt[:, position] = (clean[:, position] + 7) % models.VOCAB_SIZE
    return PromptPairs(clean, corrupt, target, **masks)


def padded(side: str) -> PromptPairs:
    """Three pairs of 7, 6 and 5 tokens, padded on one side, with a target at each row's last real token."""
    mask = torch.ones(3, 7, dtype=torch.long)
    for row in (1, 2):
        mask[row, slice(0, row) if side == "left" else slice(7 - row, 7)] = 0
    pairs = make_pairs(3, 7, (2, 3), logit_diff(3, 5), clean_mask=mask, corrupt_mask=mask)
    return PromptPairs(pairs.clean * mask, pairs.corrupt * mask, pairs.target, mask, mask)


def run_patched(model: TransformerBridge, tokens: Tensor, name: str, edit: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of a whole forward pass with one activation edited: the oracle."""
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda value, hook: edit(value.clone()))], use_cache=False)


def state(model: TransformerBridge) -> tuple[Any, ...]:
    """What a caller would miss if it were changed."""
    hooks = {name: (len(point.fwd_hooks), len(point.bwd_hooks), len(point._forward_hooks)) for name, point in model.hook_dict.items()}
    blocks = [(len(block._forward_pre_hooks), "forward" in vars(block)) for block in model.blocks]
    flags = [parameter.requires_grad for parameter in model.original_model.parameters()]
    return hooks, blocks, flags, model.training, {key: value.clone() for key, value in model.original_model.state_dict().items()}.keys()
