"""Tiny random models of more families, beside those of tests/models.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

from tests.models import N_CTX, VOCAB_SIZE, bridge_from_config

_COMMON: dict[str, object] = dict(
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=N_CTX,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
)
_GROUPED = _COMMON | dict(num_key_value_heads=2, pad_token_id=0)
_GEMMA = _GROUPED | dict(head_dim=4)
_SETTINGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "mistral": ("MistralForCausalLM", "MistralConfig", _GROUPED | dict(sliding_window=4)),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA | dict(sliding_window=4)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=2, n_head=4)),
    "opt": ("OPTForCausalLM", "OPTConfig", _COMMON | dict(ffn_dim=24, word_embed_proj_dim=16)),
    "gptj": (
        "GPTJForCausalLM",
        "GPTJConfig",
        dict(vocab_size=VOCAB_SIZE, n_positions=N_CTX, n_embd=16, n_layer=2, n_head=4, rotary_dim=2),
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _COMMON),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", _GROUPED | dict(num_local_experts=4)),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _GROUPED | dict(head_dim=4, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2),
    ),
    "granite": (  # the multipliers of its released models
        "GraniteForCausalLM",
        "GraniteConfig",
        _GROUPED | dict(embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.3),
    ),
    "gpt_oss": (  # small limits, so that the clamps of its gates bite
        "GptOssForCausalLM",
        "GptOssConfig",
        _GROUPED | dict(head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, swiglu_limit=0.5),
    ),
    "deepseek_v3": (  # one dense layer, one with experts
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _COMMON
        | dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=6)
        | dict(n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=12, first_k_dense_replace=1),
    ),
}
_REFUSED: dict[str, tuple[str, str, dict[str, object]]] = {
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        _GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, shared_expert_intermediate_size=12),
    ),
}
WIDER = list(_SETTINGS)
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def build_wider(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: object) -> TransformerBridge:
    """A tiny random model of one of `WIDER`, or of `_REFUSED`."""
    model_class, config_class, settings = (_SETTINGS | _REFUSED)[family]
    make: Callable[..., transformers.PretrainedConfig] = getattr(transformers, config_class)
    config = make(**(settings | overrides))
    config._experts_implementation = "eager"  # the default for mixtures of experts, grouped_mm, knows no float64
    model = bridge_from_config(getattr(transformers, model_class), config, dtype, seed)
    for name, buffer in model.original_model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # DeepSeek-V3 chooses its experts by it
            buffer.copy_(torch.linspace(-0.02, 0.02, len(buffer)))
    return model
