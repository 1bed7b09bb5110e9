"""The families of tiny_models.py with the settings in which models were released, beside the defaults of their config classes.

    python -m analyses.benchmarks.families --released

Multipliers, logit scales, soft-caps, sliding windows, layers without rotation, partial and scaled rotation, biases or none, tied and untied
weights, parallel blocks: each is a line of a family's forward that a default leaves out. Every entry is right (the conservation account
closes, the pair rules are complete, the logits are the model's own) or refused with a reason; the sizes are those of a tiny model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import build

_LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
_SHORT = dict(original_max_position_embeddings=8)  # so that a tiny model's context is beyond it
_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, beta_fast=32.0, beta_slow=1.0) | _SHORT


@dataclass(frozen=True)
class Released:
    """One released setting.

    Attributes:
        family: name of the family in tiny_models.py.
        models: released models that have it.
        settings: of the config, beside those of the family.
    """

    family: str
    models: str
    settings: dict[str, Any]


RELEASED: list[Released] = [
    Released("gpt2", "Mistral's GPT-2 (stanford-crfm)", dict(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True)),
    Released("gpt2", "untied", dict(tie_word_embeddings=False, activation_function="relu")),
    Released("neox_parallel", "Pythia", dict(rotary_pct=0.25, hidden_act="gelu", tie_word_embeddings=False)),
    Released("neox_parallel", "GPT-NeoX-20B", dict(hidden_act="gelu_fast", rotary_pct=0.5)),
    Released("neox_sequential", "RedPajama-INCITE", dict(rotary_pct=1.0)),
    Released("neox_parallel", "without biases on attention", dict(attention_bias=False)),
    Released("gptj", "GPT-J-6B", dict(rotary_dim=4, tie_word_embeddings=False)),
    Released("opt", "OPT-350m", dict(word_embed_proj_dim=8, do_layer_norm_before=False)),
    Released("opt", "Galactica", dict(enable_bias=False, layer_norm_elementwise_affine=True, activation_function="gelu")),
    Released("opt", "without norm weights", dict(layer_norm_elementwise_affine=False)),
    Released("bloom", "residual after the norm", dict(apply_residual_connection_post_layernorm=True)),
    Released("llama", "Llama 2", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    Released("llama", "Llama 3.1, 3.2", dict(rope_parameters=_LLAMA3 | _SHORT, tie_word_embeddings=True)),
    Released("llama", "with biases", dict(attention_bias=True, mlp_bias=True)),
    Released("llama", "linear rotary scaling (Vicuna 16k)", dict(rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=4.0))),
    Released("mistral", "Mistral-Nemo", dict(head_dim=8, sliding_window=None)),
    Released("qwen2", "Qwen2.5-0.5B", dict(tie_word_embeddings=True)),
    Released("qwen2", "sliding windows on upper layers", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    Released("qwen3", "Qwen3-0.6B", dict(head_dim=8, tie_word_embeddings=True)),
    Released("gemma", "Gemma 1", dict(head_dim=8, hidden_activation="gelu_pytorch_tanh", num_key_value_heads=1)),
    Released("gemma2", "Gemma 2", dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=16, head_dim=8)),
    Released(
        "gemma3",
        "Gemma 3",
        dict(layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8, num_key_value_heads=1, tie_word_embeddings=True),
    ),
    Released(
        "gemma3",
        "Gemma 3 from 4B on (scaled rotation on global layers)",
        dict(
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
                full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
            ),
        ),
    ),
    Released("gemma3", "soft-caps", dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0)),
    Released("phi3", "Phi-3-mini", dict(num_key_value_heads=4, sliding_window=4)),
    Released("phi3", "Phi-4-mini", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    Released(
        "phi3",
        "Phi-3 128k",
        dict(
            original_max_position_embeddings=8,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                short_factor=[1.0, 1.1],
                long_factor=[2.0, 3.0],
                original_max_position_embeddings=8,
            ),
        ),
    ),
    Released("olmo2", "OLMo 2", dict(num_key_value_heads=4, tie_word_embeddings=False)),
    Released("mixtral", "Mixtral-8x7B", dict(num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.0)),
    Released("qwen3_moe", "Qwen3-30B-A3B", dict(norm_topk_prob=True, head_dim=8)),
    Released("qwen3_moe", "dense layers between", dict(mlp_only_layers=[0], norm_topk_prob=True)),
    Released("bert", "untied", dict(tie_word_embeddings=False, hidden_act="relu")),
    Released("bert_classifier", "two classes", dict(num_labels=2, hidden_act="gelu_new")),
    Released("native", "as a copy of GPT-2", dict(act_fn="gelu_new")),
    Released("native_gated_rotary", "soft-caps", dict(attn_scores_soft_cap=2.0, output_logits_soft_cap=4.0)),
    Released("t5", "Flan-T5, T5 v1.1", dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    Released("t5", "few buckets", dict(relative_attention_num_buckets=4, relative_attention_max_distance=6)),
    Released("bart", "scaled embeddings", dict(scale_embedding=True, activation_function="gelu")),
    Released("vit", "without biases on queries, keys and values", dict(qkv_bias=False)),
    Released("vit", "ReLU, three classes", dict(hidden_act="relu", num_labels=3)),
    Released("deit", "two classes", dict(num_labels=2)),
    Released("deepseek_v3", "DeepSeek-V3", dict(routed_scaling_factor=2.5, n_shared_experts=2, topk_group=1, attention_bias=True)),
    Released("deepseek_v3", "DeepSeek-V3 (scaled rotation)", dict(rope_parameters=_YARN | dict(mscale=1.0, mscale_all_dim=1.0))),
    Released("deepseek_v3", "queries of full rank", dict(q_lora_rank=None)),
    Released("llava", "LLaVA 1.5", dict(projector_hidden_act="gelu", vision_feature_layer=-2)),
    Released("gpt_oss", "GPT-OSS", dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4, rope_parameters=_YARN)),
    Released("mamba", "Mamba", dict(use_bias=True)),
    Released("apertus", "Apertus-8B", dict(rope_parameters=_LLAMA3 | _SHORT)),
    Released("arcee", "AFM-4.5B", dict(rope_parameters=_YARN, hidden_act="relu2")),
    Released("cohere", "Command R", dict(logit_scale=0.0625, tie_word_embeddings=True)),
    Released("cohere", "Command R+", dict(use_qk_norm=True, logit_scale=0.8333)),
    Released("cohere2", "Command R7B", dict(logit_scale=0.25, sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    Released("ernie4_5", "ERNIE 4.5 0.3B", dict(use_bias=False, head_dim=8, tie_word_embeddings=True)),
    Released("ernie4_5", "with biases", dict(use_bias=True)),
    Released("exaone4", "EXAONE 4.0 1.2B", dict(tie_word_embeddings=True, sliding_window=None)),
    Released("exaone4", "EXAONE 4.0 32B", dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    Released(
        "granite",
        "Granite 3.x",
        dict(
            embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=8.0, attention_multiplier=0.015625, tie_word_embeddings=True
        ),
    ),
    Released("jais2", "Jais 2", dict(attention_bias=True, mlp_bias=True)),
    Released("ministral3", "Ministral 3", dict(rope_parameters=_YARN | dict(llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0))),
    Released("nemotron", "Nemotron-4", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    Released("nemotron", "Minitron (head size of its own)", dict(head_dim=8)),
    Released("olmo", "OLMo-1B", dict(tie_word_embeddings=True, clip_qkv=None)),
    Released("olmo", "OLMo-7B-Twin-2T (clamped queries, keys and values)", dict(clip_qkv=8.0)),
    Released("olmo3", "OLMo 3", dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])),
    Released("phi", "Phi-2", dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5))),
    Released("phi", "norms on queries and keys", dict(qk_layernorm=True)),
    Released("smollm3", "SmolLM3-3B", dict(no_rope_layers=[1, 0], tie_word_embeddings=True)),
    Released("stablelm", "StableLM 2 1.6B", dict(use_qkv_bias=True)),
    Released("stablelm", "StableLM 2 12B", dict(qk_layernorm=True, use_parallel_residual=True)),
    Released("starcoder2", "StarCoder2-3B", dict(sliding_window=4, use_bias=True, tie_word_embeddings=True)),
    Released("starcoder2", "without biases", dict(use_bias=False)),
    Released("vaultgemma", "VaultGemma 1B", dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=16)),
    Released("seed_oss", "Seed-OSS-36B", dict(attention_bias=True, attention_out_bias=False, head_dim=8)),
    Released("glm", "GLM-4-9B", dict(attention_bias=True, head_dim=8)),
    Released("glm4", "GLM-4-0414", dict(attention_bias=True, head_dim=8)),
    Released("falcon", "Falcon-7B", dict(multi_query=True, parallel_attn=True, bias=False)),
    Released("falcon", "Falcon-40B", dict(new_decoder_architecture=True, num_kv_heads=2, bias=False)),
    Released("falcon", "Falcon-RW-1B", dict(alibi=True, parallel_attn=False, multi_query=False, bias=True)),
    Released("gpt_bigcode", "SantaCoder, StarCoder", dict(multi_query=True, activation_function="gelu_pytorch_tanh")),
    Released("gpt_bigcode", "several keys and values", dict(multi_query=False)),
    Released("gpt_neo", "GPT-Neo 1.3B", dict(activation_function="gelu_new", tie_word_embeddings=True)),
    Released("olmoe", "OLMoE-1B-7B", dict(norm_topk_prob=False)),
    Released("olmoe", "clamped queries, keys and values", dict(clip_qkv=8.0)),
    Released("flex_olmo", "FlexOlmo-7x7B", dict(norm_topk_prob=False)),
    Released("glm4_moe", "GLM-4.5", dict(use_qk_norm=True, attention_bias=True, routed_scaling_factor=2.5, n_shared_experts=1)),
    Released("roberta", "RoBERTa", dict(type_vocab_size=1, hidden_act="gelu")),
    Released("bert_lm_head", "a causal decoder", dict(is_decoder=True)),
    Released("mt5", "mT5, untied", dict(tie_word_embeddings=False, feed_forward_proj="gated-gelu")),
    Released("mbart", "mBART-large", dict(scale_embedding=True, activation_function="gelu")),
    Released("marian", "OPUS-MT", dict(scale_embedding=True, activation_function="swish", normalize_before=False)),
    Released("pegasus", "PEGASUS", dict(scale_embedding=True, activation_function="relu")),
    Released("m2m_100", "M2M100, NLLB", dict(scale_embedding=True, activation_function="relu")),
    Released("blenderbot", "Blenderbot-3B", dict(scale_embedding=True, activation_function="gelu")),
]


def build_released(released: Released, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random model with released settings. Buffers that training fills, and that start at 0, are filled too."""
    model = build(released.family, dtype, seed, **released.settings)
    for name, buffer in model.original_model.named_buffers():
        if name.endswith(("final_logits_bias", "e_score_correction_bias")):
            buffer.copy_(torch.linspace(-0.02, 0.02, buffer.numel()).reshape(buffer.shape))
    return model
