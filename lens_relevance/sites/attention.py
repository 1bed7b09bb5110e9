"""Attention components: where scores, pattern and z are, by the class of component that TransformerLens runs the attention in.

| class | families | scores | pattern | rotation |
|---|---|---|---|---|
| JointQKVAttentionBridge, BloomAttentionBridge | GPT-2, Bloom | live | live | none |
| JointQKVPositionEmbeddingsAttentionBridge | NeoX | live | live | between q, k and the scores, no HookPoint |
| PositionEmbeddingsAttentionBridge | Llama, Qwen, Gemma, OLMo2, GPT-OSS | live | live | at hook_rot_q, hook_rot_k |
| MLAAttentionBridge | DeepSeek-V3 | live | live | below hook_q, hook_k |
| AttentionBridge | OPT, GPT-J, BERT, native models | recomputed | recomputed | inside: an AttentionFamily says how |

A family that is registered for the Hugging Face class takes precedence: the steps are then recomputed as it says (delegated_attention.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    BloomAttentionBridge,
    JointQKVAttentionBridge,
    JointQKVPositionEmbeddingsAttentionBridge,
    MLAAttentionBridge,
    PositionEmbeddingsAttentionBridge,
)

from lens_relevance.errors import CoverageError
from lens_relevance.rules import AttentionGeometry, Mix, Scores, Softmax
from lens_relevance.sites.base import Site
from lens_relevance.sites.delegated_attention import delegated_sites
from lens_relevance.sites.families import ATTENTION


def attention_sites(name: str, component: AttentionBridge) -> list[Site]:
    """Scores, pattern and z of an attention component; raises CoverageError where it is not known how it computes."""
    if type(component.original_component).__name__ not in ATTENTION:
        if type(component) in _LIVE:
            return _LIVE[type(component)](name, component)
        if isinstance(component, PositionEmbeddingsAttentionBridge):
            return _position_embeddings_sites(name, component)
    return delegated_sites(name, component)


def _live_sites(
    name: str, component: Any, geometry: AttentionGeometry, inputs: tuple[HookPoint, ...], values: HookPoint | None = None
) -> list[Site]:
    scores, pattern, sinks = component.hook_attn_scores, component.hook_pattern, getattr(component.original_component, "sinks", None)
    return [
        Site(f"{name}:scores", "attn", Scores(geometry), inputs, scores),
        Site(f"{name}:pattern", "attn", Softmax(None if sinks is None else sinks.detach()), (scores,), pattern),
        Site(f"{name}:z", "attn", Mix(geometry), (pattern, values or component.v.hook_out), component.o.hook_in),
    ]


def _heads(component: Any) -> tuple[int, int, int]:
    config = component.config
    n_heads = int(config.n_heads)
    d_head = int(getattr(config, "d_head", 0) or config.d_model // n_heads)
    return n_heads, int(getattr(config, "n_key_value_heads", None) or n_heads), d_head


def _joint_sites(name: str, component: Any) -> list[Site]:
    """Queries, keys and values from one matrix; ALiBi (Bloom) is added to the scores, the same in both runs."""
    return _live_sites(name, component, _joint_geometry(component), (component.q.hook_out, component.k.hook_out))


def _rotated_joint_sites(name: str, component: Any) -> list[Site]:
    """The same, with queries and keys rotated on the way to the scores (NeoX)."""
    geometry = _joint_geometry(component)
    geometry.rotate = _rotate_halves
    inputs = (component.q.hook_out, component.k.hook_out, component.hook_cos, component.hook_sin)
    return _live_sites(name, component, geometry, inputs)


def _joint_geometry(component: Any) -> AttentionGeometry:
    n_heads, n_key_value_heads, d_head = _heads(component)
    scale = d_head**-0.5
    if getattr(component.config, "scale_attn_by_inverse_layer_idx", False) and component._layer_idx is not None:
        scale /= component._layer_idx + 1
    return AttentionGeometry(n_heads, n_key_value_heads, d_head, scale=scale, adds_bias=isinstance(component, BloomAttentionBridge))


def _position_embeddings_sites(name: str, component: Any) -> list[Site]:
    """Queries and keys rotated at HookPoints of their own (the Llama type)."""
    return _live_sites(name, component, _llama_geometry(name, component), (component.hook_rot_q, component.hook_rot_k))


def _llama_geometry(name: str, component: Any) -> AttentionGeometry:
    original = component.original_component
    plain = PositionEmbeddingsAttentionBridge._pre_output_projection
    between = {  # steps that some families have between the HookPoints and that no site describes
        "gated attention outputs": component._modules.get("gate") is not None or getattr(component.config, "gated_q_proj", False),
        "norms of queries and keys after the rotation": getattr(component.config, "qk_norm_after_rope", False),
        "queries, keys and values clamped by clip_qkv": getattr(getattr(original, "config", None), "clip_qkv", None) is not None,
        "steps between z and the output projection": type(component)._pre_output_projection is not plain,
    }
    for step, present in between.items():
        if present:
            raise CoverageError(f"{name}: {step} are not supported by the attention rules yet")
    d_head = int(original.head_dim)
    n_heads = component.q.original_component.weight.shape[0] // d_head
    group = int(getattr(original, "num_key_value_groups", 1))
    scale, cap = getattr(original, "scaling", d_head**-0.5), getattr(original, "attn_logit_softcapping", None)
    return AttentionGeometry(n_heads, n_heads // group, d_head, scale=float(scale), soft_cap=cap, queries_are_split=True)


def _latent_sites(name: str, component: Any) -> list[Site]:
    """Latent attention (DeepSeek-V3): its low-rank projections are linear layers and norms with sites of their own."""
    original: Any = component.original_component
    if getattr(original, "scaling", None) is None:
        raise CoverageError(f"{name}: the scale of {type(original).__name__} is not known, so no attention rule can be placed there")
    n_heads, d_head, d_value = int(original.num_heads), int(original.qk_head_dim), int(original.v_head_dim)
    geometry = AttentionGeometry(
        n_heads, n_heads, d_head, scale=float(original.scaling), queries_are_split=True, values_are_split=True, d_value=d_value
    )
    return _live_sites(name, component, geometry, (component.hook_q, component.hook_k), component.hook_v)


class SplitHeads:
    """[batch, pos, head * d] as [batch, pos, head, d], and back."""

    def __init__(self, n_heads: int) -> None:
        self.n_heads = n_heads

    def convert(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def revert(self, x: Tensor) -> Tensor:
        return x.flatten(-2)


def _rotate_halves(x: Tensor, sign: int, constants: tuple[Tensor, ...]) -> Tensor:
    """Rotary embedding of [.., head, pos, d_head] with the model's own cos and sin [batch, pos, rotary]; sign -1 is its transpose.

    A hook may have edited the sines, so that the two halves of them differ: the transpose takes each with the feature it was multiplied to.
    """
    cos, sin = (c.to(x.dtype).unsqueeze(1) for c in constants)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = (turned if sign > 0 else turned * sin).chunk(2, -1)
    swapped = torch.cat([-second, first], -1)
    return torch.cat([turned * cos + (swapped * sin if sign > 0 else -swapped), rest], -1)


_LIVE: dict[type[AttentionBridge], Callable[[str, Any], list[Site]]] = {  # a subclass may compute otherwise
    JointQKVAttentionBridge: _joint_sites,
    BloomAttentionBridge: _joint_sites,
    JointQKVPositionEmbeddingsAttentionBridge: _rotated_joint_sites,
    MLAAttentionBridge: _latent_sites,
}
