"""What the blocks of a model are that their sites alone do not say: how attention and MLP read the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import ParallelBlockBridge


@dataclass(frozen=True)
class Block:
    """One block.

    Attributes:
        path: its name among the model's components, "blocks.3".
        parallel: attention and MLP read the same residual stream (NeoX, GPT-J), and not the MLP what attention has added to.
        norms_follow: the norms take the stream after attention and MLP have been added to it (BERT, OPT-350m), and not before they read it.
        adds_inside: the attention component does that itself: it gives the norm's output (BERT).
        has_mlp: whether there is an MLP.
        attention: what computes its attention, in words for messages.
    """

    path: str
    parallel: bool
    norms_follow: bool
    adds_inside: bool
    has_mlp: bool
    attention: str


def bridge_blocks(model: TransformerBridge) -> list[Block]:
    """The blocks of a bridge with one stack of them; empty for any other."""
    return [_block(f"blocks.{i}", block) for i, block in enumerate(getattr(model, "blocks", []))]


def _block(path: str, block: Any) -> Block:
    original = block.original_component
    return Block(
        path=path,
        parallel=isinstance(block, ParallelBlockBridge),
        norms_follow=_adds_inside(original) or not getattr(original, "do_layer_norm_before", True),
        adds_inside=_adds_inside(original),
        has_mlp="mlp" in block._modules,
        attention=type(getattr(block, "attn", None)).__name__,
    )


def _adds_inside(original: Any) -> bool:
    """Whether the attention of a Hugging Face layer adds its output to the stream and normalises the sum itself (BERT, RoBERTa)."""
    return hasattr(getattr(getattr(original, "attention", None), "output", None), "LayerNorm")
