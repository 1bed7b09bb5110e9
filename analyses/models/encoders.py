"""Loading the encoders that TransformerLens has no adapter for: classifiers of texts or tokens, and encoders without a head."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, PreTrainedConfig

from lens_relevance.sites.encoders import ENCODERS, bridge_encoder

__all__ = ["bridge_encoder", "load_encoder"]


def load_encoder(source: str, config: PreTrainedConfig, dtype: torch.dtype, *, device: str | None) -> TransformerBridge | None:
    """A folder or hub name whose config names one of `ENCODERS`; None for any other, which TransformerLens loads itself."""
    named = getattr(config, "architectures", None) or []
    model_class: Any = next((found for name, found in ENCODERS.items() if name in named), None)
    if model_class is None:
        return None
    model = model_class.from_pretrained(source, attn_implementation="eager", dtype=dtype, device_map=device)
    return bridge_encoder(model, AutoTokenizer.from_pretrained(source))
