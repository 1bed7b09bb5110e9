"""Tiny random models of architectures that TransformerLens has no adapter for."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertForMaskedLM, WhisperConfig, WhisperForConditionalGeneration

from tests.models import randomize

N_MEL, N_FRAMES = 5, 18


def build_albert(dtype: torch.dtype = torch.float64, n_layers: int = 4) -> AlbertForMaskedLM:
    """An ALBERT of one layer that is called n_layers times."""
    config = AlbertConfig(
        vocab_size=30,
        embedding_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        max_position_embeddings=20,
        hidden_act="gelu",
    )
    model = AlbertForMaskedLM(config)
    randomize(model, 0)
    return model.to(dtype).eval()


def build_whisper(dtype: torch.dtype = torch.float64) -> WhisperForConditionalGeneration:
    """A Whisper of 2 + 3 layers that hears 9 frames."""
    config = WhisperConfig(
        vocab_size=30,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=N_MEL,
        max_source_positions=N_FRAMES // 2,
        max_target_positions=12,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    randomize(model, 0)
    return model.to(dtype).eval()


def sounds(seed: int = 0) -> dict[str, Tensor]:
    """Two sounds and five tokens for each; the tokens are the same for every seed."""
    tokens = torch.randint(4, 30, (2, 5), generator=torch.Generator().manual_seed(7))
    sound = torch.randn(2, N_MEL, N_FRAMES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"input_features": sound, "decoder_input_ids": tokens}
