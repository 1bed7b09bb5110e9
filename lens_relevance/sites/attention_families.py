"""The attention modules that TransformerLens runs as a whole and lens_relevance knows: one registered family each."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lens_relevance.sites.families import AttentionFamily, Call, argument_mask, register_attention


def _rotate_pairs(module: Any, call: Call, x: Tensor, sign: int) -> Tensor:
    """GPT-J: adjacent pairs of the first rotary_dim features, by the module's own table of sines and cosines."""
    table = module._get_embed_positions(call["position_ids"])[torch.arange(1), call["position_ids"]]
    sin, cos = (t.to(x.dtype).repeat_interleave(2, -1).unsqueeze(1) for t in table.chunk(2, -1))
    turned, rest = x[..., : sin.shape[-1]], x[..., sin.shape[-1] :]
    swapped = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    return torch.cat([turned * cos + sign * swapped * sin, rest], -1)


def _relative_bias(module: Any, call: Call, scores: Tensor) -> Tensor | None:
    """T5: the first layer of a stack computes a bias per head and distance, the others get it as an argument; cross-attention has none."""
    given = call.get("position_bias")
    if given is not None or not module.has_relative_attention_bias:
        return given
    queries, keys = (torch.arange(n, device=scores.device) for n in scores.shape[-2:])
    buckets = module._relative_position_bucket(
        keys - queries.unsqueeze(1),
        bidirectional=not module.is_decoder,
        num_buckets=module.relative_attention_num_buckets,
        max_distance=module.relative_attention_max_distance,
    )
    return functional.embedding(buckets, module.relative_attention_bias.weight).movedim(-1, 0)


def _causal_mask(module: Any, call: Call, scores: Tensor) -> Tensor:
    """GPT-Neo: a causal (on every other layer also local) mask of the module's own, besides the one it is called with."""
    queries, keys = scores.shape[-2:]
    seen = module.bias[0, 0, keys - queries : keys, :keys]
    own, given = torch.zeros_like(seen, dtype=scores.dtype).masked_fill(~seen, float("-inf")), argument_mask(module, call, scores)
    return own if given is None else own + given


def _native_mask(module: Any, call: Call, scores: Tensor) -> Tensor:
    """TransformerLens's own model: causal or not, and the mask of the call."""
    seq = scores.shape[-1]
    blocked = module.causal_mask[:seq, :seq] if module.causal else torch.zeros(seq, seq, dtype=torch.bool, device=scores.device)
    given = call.get("attention_mask")
    if given is not None:
        blocked = module._combine_attention_mask(blocked, given, batch=scores.shape[-4])
    return torch.zeros_like(blocked, dtype=scores.dtype).masked_fill(blocked, float("-inf"))


def _native_rotation(module: Any, call: Call, x: Tensor, sign: int) -> Tensor:
    """TransformerLens's own model: by its table of cosines and sines, where it has rotary positions."""
    rotary, positions = module.rotary, call.get("position_ids")
    if rotary is None:
        return x
    width, seq = rotary.rotary_dim, x.shape[-2]
    cos, sin = (t[:seq] if positions is None else t[positions].unsqueeze(1) for t in (rotary.cos_cached, rotary.sin_cached))
    turned, rest = x[..., :width], x[..., width:]
    return torch.cat([turned * cos.to(x.dtype) + sign * rotary._rotate_half(turned) * sin.to(x.dtype), rest], -1)


_PLAIN = AttentionFamily()
_BERT = AttentionFamily(n_heads=lambda m: int(m.num_attention_heads), called=lambda wrapped: wrapped.self)
_VISION = AttentionFamily(n_heads=lambda m: int(m.num_attention_heads))
_T5 = AttentionFamily(n_heads=lambda m: int(m.n_heads), position_bias=_relative_bias, mask=partial(argument_mask, argument="mask"))

for _name in ("OPTAttention", "BartAttention", "MBartAttention", "MarianAttention", "PegasusAttention"):
    register_attention(_name, _PLAIN)
for _name in ("M2M100Attention", "BlenderbotAttention"):
    register_attention(_name, _PLAIN)
for _name in ("BertAttention", "RobertaAttention"):
    register_attention(_name, _BERT)
for _name in ("ViTAttention", "DeiTAttention"):
    register_attention(_name, _VISION)
for _name in ("T5Attention", "MT5Attention"):
    register_attention(_name, _T5)
register_attention(
    "GPTJAttention",
    AttentionFamily(scale=lambda m: 1.0 / float(m.scale_attn), n_heads=lambda m: int(m.num_attention_heads), rotate=_rotate_pairs),
)
register_attention("GPTNeoSelfAttention", AttentionFamily(scale=lambda m: 1.0, mask=_causal_mask))
register_attention(
    "NativeAttention",
    AttentionFamily(
        scale=lambda m: 1.0 / m.scale,
        n_heads=lambda m: int(m.n_heads),
        soft_cap=lambda m: m.attn_scores_soft_cap if m.attn_scores_soft_cap > 0 else None,
        rotate=_native_rotation,
        mask=_native_mask,
        pattern_is_live=True,
    ),
)
