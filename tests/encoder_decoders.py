"""Tiny random encoder-decoders, and inputs for them."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tests.models import VOCAB_SIZE, bridge_from_config

_SIZES: dict[str, object] = dict(vocab_size=VOCAB_SIZE, d_model=16, decoder_start_token_id=0, pad_token_id=0)
_T5 = _SIZES | dict(d_kv=4, d_ff=24, num_layers=2, num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=12)
_STACKS: dict[str, object] = {
    f"{stack}_{key}": n for stack in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))
}
_SETTINGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | dict(feed_forward_proj="relu")),
    "flan_t5": ("T5ForConditionalGeneration", "T5Config", _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        _SIZES | _STACKS | dict(max_position_embeddings=32, bos_token_id=1, eos_token_id=2, forced_eos_token_id=2),
    ),
}
ENCODER_DECODERS = list(_SETTINGS)


def build_encoder_decoder(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random model of one of `ENCODER_DECODERS`."""
    model_class, config_class, settings = _SETTINGS[family]
    return bridge_from_config(getattr(transformers, model_class), getattr(transformers, config_class)(**settings), dtype, seed)


def sources_and_targets(batch: int = 2, source: int = 7, target: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two inputs of the same shape, without the padding token."""
    generator = torch.Generator().manual_seed(0)
    one, two = (
        {
            "input_ids": torch.randint(3, VOCAB_SIZE, (batch, source), generator=generator),
            "decoder_input_ids": torch.randint(3, VOCAB_SIZE, (batch, target), generator=generator),
        }
        for _ in range(2)
    )
    return one, two
