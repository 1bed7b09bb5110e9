"""The encoder-decoders of the table of tiny models, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import build
from tests.models import VOCAB_SIZE

ENCODER_DECODERS = ["t5", "flan_t5", "bart"]


def build_encoder_decoder(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random model of one of `ENCODER_DECODERS`, with few buckets of distances, so that short prompts fall into several."""
    settings: dict[str, object] = dict(decoder_start_token_id=0, pad_token_id=0)
    if family != "bart":
        settings |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=12)
    return build(family, dtype, seed, **settings)


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
