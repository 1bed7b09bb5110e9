"""Tiny models with random weights, one of each family that the tables of this folder go over. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from analyses.models.encoders import ENCODERS, bridge_encoder

_SIZES: dict[str, Any] = dict(
    vocab_size=50, max_position_embeddings=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)
_GROUPED = _SIZES | dict(num_key_value_heads=2, pad_token_id=0)
_WITH_HEAD_SIZE = _GROUPED | dict(head_dim=4)
_GPT2: dict[str, Any] = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4)
_T5: dict[str, Any] = dict(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
_BART: dict[str, Any] = {
    f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in dict(layers=2, attention_heads=4, ffn_dim=24).items()
}
_CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=8, sliding_window=4)
_MOE = dict(moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
_ROUTED = dict(moe_intermediate_size=12, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
_MLA = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_routed_experts=4, n_group=1, topk_group=1
)
_NATIVE: dict[str, Any] = dict(
    d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=32, d_vocab=50, d_mlp=32, act_fn="gelu", normalization_type="LN"
)


@dataclass(frozen=True)
class Family:
    """A family: Hugging Face's class of model and of config, with the settings of a tiny one; no class: TransformerLens's own model."""

    model: str | None
    config: str
    settings: dict[str, Any]

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
        """A tiny model with random weights, in eval mode."""
        if self.model is None:
            native = TransformerBridge.boot_native(TransformerBridgeConfig(**self.settings), dtype=dtype)  # type: ignore[attr-defined]
            randomize(native.original_model, seed)
            return native.eval()
        config = getattr(transformers, self.config)(**self.settings)
        config._attn_implementation = "eager"
        config._experts_implementation = "eager"  # the default for mixtures of experts knows no float64
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = getattr(transformers, self.model)(config)
        randomize(model, seed)
        model.to(dtype).eval()
        if isinstance(model, ENCODERS):
            return bridge_encoder(model)
        return build_bridge_from_module(model, self.model, hf_config=config).eval()


FAMILIES: dict[str, Family] = {
    "GPT-2": Family("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "GPT-NeoX, Pythia (parallel)": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES | dict(use_parallel_residual=True, rotary_pct=0.5)),
    "GPT-NeoX (sequential)": Family("GPTNeoXForCausalLM", "GPTNeoXConfig", _SIZES | dict(use_parallel_residual=False, rotary_pct=0.5)),
    "GPT-J": Family("GPTJForCausalLM", "GPTJConfig", _GPT2 | dict(rotary_dim=2)),
    "OPT": Family("OPTForCausalLM", "OPTConfig", _SIZES | dict(ffn_dim=24, word_embed_proj_dim=16)),
    "Bloom": Family("BloomForCausalLM", "BloomConfig", dict(vocab_size=50, hidden_size=16, n_layer=2, n_head=4)),
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "Mistral": Family("MistralForCausalLM", "MistralConfig", _GROUPED | dict(sliding_window=4)),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    "Qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", _WITH_HEAD_SIZE),
    "Gemma 1": Family("GemmaForCausalLM", "GemmaConfig", _WITH_HEAD_SIZE),
    "Gemma 2": Family("Gemma2ForCausalLM", "Gemma2Config", _WITH_HEAD_SIZE | _CAPS),
    "Gemma 3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _WITH_HEAD_SIZE | dict(sliding_window=4)),
    "Phi-3": Family("Phi3ForCausalLM", "Phi3Config", _GROUPED),
    "OLMo 2": Family("Olmo2ForCausalLM", "Olmo2Config", _GROUPED),
    "Mixtral": Family("MixtralForCausalLM", "MixtralConfig", _GROUPED | dict(num_local_experts=4)),
    "Qwen3-MoE": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _WITH_HEAD_SIZE | _MOE),
    "BERT (masked language model)": Family("BertForMaskedLM", "BertConfig", _SIZES),
    "BERT (sequence classification)": Family("BertForSequenceClassification", "BertConfig", _SIZES | dict(num_labels=3)),
    "native (LayerNorm)": Family(None, "", _NATIVE),
    "native (RMSNorm, gated, rotary)": Family(
        None, "", _NATIVE | dict(normalization_type="RMS", gated_mlp=True, act_fn="silu", positional_embedding_type="rotary", rotary_dim=4)
    ),
    "T5": Family("T5ForConditionalGeneration", "T5Config", _T5),
    "BART": Family("BartForConditionalGeneration", "BartConfig", _BART | dict(vocab_size=50, d_model=16, max_position_embeddings=32)),
    "ViT": Family(
        "ViTForImageClassification",
        "ViTConfig",
        dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4),
    ),
    "DeiT": Family(
        "DeiTForImageClassification",
        "DeiTConfig",
        dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4),
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _SIZES | _MLA | dict(moe_intermediate_size=12, num_experts_per_tok=2, first_k_dense_replace=1),
    ),
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        dict(
            text_config=_GROUPED | dict(model_type="llama"),
            vision_config=_SIZES | dict(model_type="clip_vision_model", image_size=8, patch_size=4),
            image_token_id=49,
            image_seq_length=4,
        ),
    ),
    "GPT-OSS": Family("GptOssForCausalLM", "GptOssConfig", _WITH_HEAD_SIZE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "Mamba": Family("MambaForCausalLM", "MambaConfig", dict(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)),
}


def _causal(name: str, **settings: Any) -> Family:
    return Family(f"{name}ForCausalLM", f"{name}Config", settings or _GROUPED)


def _translator(model: str, config: str) -> Family:
    return Family(
        model, config, _BART | dict(vocab_size=50, d_model=16, max_position_embeddings=32, pad_token_id=0, decoder_start_token_id=2)
    )


# Families that need no code of their own beside an entry somewhere, or not even that; run under two rulesets by the tests.
MORE: dict[str, Family] = {
    **{
        name: _causal(name)
        for name in ("Apertus", "Arcee", "Cohere", "Cohere2", "Ernie4_5", "Exaone4", "Granite", "Jais2", "Ministral3", "Nemotron", "Olmo")
    },
    **{name: _causal(name) for name in ("Olmo3", "Phi", "SeedOss", "SmolLM3", "StableLm", "Starcoder2", "VaultGemma")},
    "Glm": _causal("Glm", **_WITH_HEAD_SIZE),
    "Glm4": _causal("Glm4", **_WITH_HEAD_SIZE),
    "Falcon": _causal("Falcon", **_SIZES),
    "GPTBigCode": _causal("GPTBigCode", **_GPT2),
    "GPTNeo": _causal("GPTNeo", **_SIZES, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4),
    "Olmoe": _causal("Olmoe", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    "FlexOlmo": _causal("FlexOlmo", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    "Glm4Moe": _causal("Glm4Moe", **_WITH_HEAD_SIZE, **_ROUTED),
    "Roberta": Family("RobertaForMaskedLM", "RobertaConfig", _SIZES | dict(max_position_embeddings=40)),
    "BertLMHead": Family("BertLMHeadModel", "BertConfig", _SIZES),
    "MT5": Family("MT5ForConditionalGeneration", "MT5Config", _T5),
    "MBart": _translator("MBartForConditionalGeneration", "MBartConfig"),
    "Marian": _translator("MarianMTModel", "MarianConfig"),
    "Pegasus": _translator("PegasusForConditionalGeneration", "PegasusConfig"),
    "M2M100": _translator("M2M100ForConditionalGeneration", "M2M100Config"),
    "Blenderbot": _translator("BlenderbotForConditionalGeneration", "BlenderbotConfig"),
}


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Every parameter from a seeded normal, biases and norm weights too: these start at 0 or 1, where an error in them would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if parameter.ndim >= 2:
            parameter.copy_(noise * 0.3)
        else:
            parameter.copy_(0.2 * noise + (1 if name.endswith(("weight", ".w")) else 0))
