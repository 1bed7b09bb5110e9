"""The encoder-decoders of the table of tiny models, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor

from analyses.benchmarks.tiny_models import build as build_encoder_decoder
from tests.models import VOCAB_SIZE

__all__ = ["ENCODER_DECODERS", "build_encoder_decoder", "sources_and_targets"]

ENCODER_DECODERS = ["t5", "flan_t5", "bart"]


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
