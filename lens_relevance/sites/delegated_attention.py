"""Attention that TransformerLens leaves to Hugging Face's own module.

What such a component shows at its scores and pattern HookPoints is not what it goes on with, so the three steps are recomputed from q, k
and v (see hooks/recomputation.py), with the mask that the module is called with. A family is one entry of `_FAMILIES`: the module
that is called with the mask, and how it scales and rotates.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lens_relevance.errors import CoverageError
from lens_relevance.rules import AttentionGeometry, Mix, Scores, Softmax
from lens_relevance.sites.base import Site

Call = dict[str, Any]


@dataclass(frozen=True)
class _Family:
    """How one Hugging Face attention module computes.

    caller: from the component's original to the module that gets the mask; mask: names of that argument; scale: of q k^T, from the module;
    rotate: of queries and keys, position_bias: what is added to the scores besides the mask, for a module and its last call.
    """

    scale: Callable[[Any], float]
    caller: Callable[[Any], nn.Module] = lambda original: original
    mask: tuple[str, ...] = ("attention_mask",)
    rotate: Callable[[Any, Call, Tensor, int], Tensor] | None = None
    n_heads: str = "num_heads"
    position_bias: Callable[[Any, Call, Tensor], Tensor | None] | None = None


def _rotate_pairs(module: Any, call: Call, x: Tensor, sign: int) -> Tensor:
    """GPT-J: adjacent pairs of the first rotary_dim features, by the module's own table of sines and cosines."""
    table = module._get_embed_positions(call["position_ids"])[torch.arange(1), call["position_ids"]]
    sin, cos = (t.to(x.dtype).repeat_interleave(2, -1).unsqueeze(1) for t in table.chunk(2, -1))
    turned, rest = x[..., : sin.shape[-1]], x[..., sin.shape[-1] :]
    swapped = torch.stack([-turned[..., 1::2], turned[..., 0::2]], -1).flatten(-2)
    return torch.cat([turned * cos + sign * swapped * sin, rest], -1)


def _relative_bias(module: Any, call: Call, scores: Tensor) -> Tensor | None:
    """T5: the first layer of a stack computes a bias per head and distance, the others are handed it; cross-attention has none."""
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


def _causal(module: Any, call: Call, scores: Tensor) -> Tensor:
    """GPT-Neo: a causal (on every other layer also local) mask of the module's own."""
    queries, keys = scores.shape[-2:]
    seen = module.bias[0, 0, keys - queries : keys, :keys]
    return torch.zeros_like(seen, dtype=scores.dtype).masked_fill(~seen, float("-inf"))


_PLAIN = _Family(scale=lambda m: float(m.scaling))
_BERT = _Family(scale=lambda m: float(m.scaling), caller=lambda original: original.self, n_heads="num_attention_heads")
_VISION = _Family(scale=lambda m: float(m.scaling), n_heads="num_attention_heads")
_T5 = _Family(scale=lambda m: float(m.scaling), mask=("mask",), n_heads="n_heads", position_bias=_relative_bias)
_FAMILIES: dict[str, _Family] = {
    **dict.fromkeys(("OPTAttention", "BartAttention", "MBartAttention"), _PLAIN),
    **dict.fromkeys(("MarianAttention", "PegasusAttention", "M2M100Attention", "BlenderbotAttention"), _PLAIN),
    **dict.fromkeys(("BertAttention", "RobertaAttention"), _BERT),
    **dict.fromkeys(("ViTAttention", "DeiTAttention"), _VISION),
    **dict.fromkeys(("T5Attention", "MT5Attention"), _T5),
    "GPTJAttention": _Family(scale=lambda m: 1.0 / float(m.scale_attn), rotate=_rotate_pairs, n_heads="num_attention_heads"),
    "GPTNeoSelfAttention": _Family(scale=lambda m: 1.0, position_bias=_causal),
}


def delegated_sites(name: str, component: Any) -> list[Site]:
    """The sites of a delegated attention; raises CoverageError for a module that is not known."""
    original = component.original_component
    family = _FAMILIES.get(type(original).__name__)
    if family is None:
        raise CoverageError(
            f"{name}: {type(component).__name__} runs {type(original).__name__} as a whole, so its scores and pattern HookPoints are "
            "decorative, and how it computes is not known; no attention rule can be placed there yet"
        )
    module = family.caller(original)
    call: Call = {}
    names = list(inspect.signature(module.forward).parameters)

    def on_call(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        call.clear()
        call.update(zip(names, args, strict=False))  # ViT hands its mask over by position
        call.update(kwargs)

    def bias(scores: Tensor) -> Tensor | None:
        added = None if family.position_bias is None else family.position_bias(module, call, scores)
        hidden = mask(scores)
        return hidden if added is None else added.to(scores.dtype) + (0.0 if hidden is None else hidden)

    def mask(scores: Tensor) -> Tensor | None:
        given = next((call[m] for m in family.mask if call.get(m) is not None), None)
        if given is None and getattr(module, "is_causal", False):
            given = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if given is None:
            return None
        if given.dtype == torch.bool:
            return torch.zeros_like(given, dtype=scores.dtype).masked_fill(~given, float("-inf"))
        return given.to(scores.dtype).masked_fill(given <= torch.finfo(given.dtype).min / 2, float("-inf"))

    rotate = family.rotate
    n_heads = int(getattr(module, family.n_heads))
    geometry = AttentionGeometry(
        n_heads,
        n_heads,
        component.q.original_component.weight.shape[0] // n_heads,
        family.scale(module),
        rotate=None if rotate is None else lambda x, sign, _: rotate(module, call, x, sign),
        bias=bias,
        adds_bias=family.position_bias is not None,
    )
    return rebuilt_sites(name, component, geometry, caller=module, on_call=on_call)


def rebuilt_sites(name: str, component: Any, geometry: AttentionGeometry, *, caller: nn.Module, on_call: Callable[..., None]) -> list[Site]:
    """Scores, pattern and z, recomputed where z comes out."""
    scores, pattern, z = component.hook_attn_scores, component.hook_pattern, component.o.hook_in
    queries_keys = (component.q.hook_out, component.k.hook_out)
    return [
        Site(f"{name}:scores", "attn", Scores(geometry), queries_keys, scores, caller=caller, on_call=on_call, rebuilt=z),
        Site(f"{name}:pattern", "attn", Softmax(), (scores,), pattern, rebuilt=z),
        Site(f"{name}:z", "attn", Mix(geometry), (pattern, component.v.hook_out), z, rebuilt=z),
    ]
