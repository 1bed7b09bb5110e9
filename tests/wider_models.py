"""The families of the table that tests go over beside those of tests/engine/families.py."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import build

MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")
WIDER = ["mistral", "qwen2", "gemma", "gemma3", "phi3", "bloom", "opt", "gptj", "bert", *MIXTURES]
_HARDER: dict[str, dict[str, object]] = {
    "gpt_oss": dict(sliding_window=4, swiglu_limit=0.5),  # small limits, so that the clamps of its gates matter
    "granite": dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.3, logits_scaling=8.0),
    "deepseek_v3": dict(n_routed_experts=6, n_group=2, v_head_dim=6),  # groups, and values of another size than queries
}


def build_wider(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> TransformerBridge:
    """A tiny random model of the table, with settings under which every part of it matters."""
    model = build(family, dtype, seed, **(_HARDER.get(family, {}) | settings))
    for name, buffer in model.original_model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # DeepSeek-V3 chooses its experts by it
            buffer.copy_(torch.linspace(-0.02, 0.02, len(buffer)))
    return model
