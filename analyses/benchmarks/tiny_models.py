"""Tiny models with random weights, one entry of one table for each family: what the tests and the benchmarks run on. Nothing is downloaded.

build("llama")                                  # float64, in eval mode, without a tokenizer
build("gpt2", torch.float32, n_layers=3)        # other settings of the config too
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lens_relevance.sites.encoders import ENCODERS, bridge_encoder

VOCABULARY, CONTEXT = 50, 32
_SIZES: dict[str, Any] = dict(
    vocab_size=50, max_position_embeddings=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
)
_GROUPED = _SIZES | dict(num_key_value_heads=2, pad_token_id=0)
_HEAD_SIZE = _GROUPED | dict(head_dim=4)
_GPT2: dict[str, Any] = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4)
_T5: dict[str, Any] = dict(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
_BART: dict[str, Any] = {
    f"{stack}_{what}": n for stack in ("encoder", "decoder") for what, n in dict(layers=2, attention_heads=4, ffn_dim=24).items()
} | dict(vocab_size=50, d_model=16, max_position_embeddings=32)
_TRANSLATOR = _BART | dict(pad_token_id=0, decoder_start_token_id=2)
_IMAGES: dict[str, Any] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4)
_CAPS = dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=8, sliding_window=4)  # small enough to bite
_MOE = dict(moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2)
_ROUTED = dict(moe_intermediate_size=12, num_experts_per_tok=2, topk_group=1, first_k_dense_replace=1)  # one dense layer, one with experts
_LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
_NATIVE: dict[str, Any] = dict(
    d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=32, d_vocab=50, d_mlp=32, act_fn="gelu", normalization_type="LN"
)


@dataclass(frozen=True)
class Family:
    """One family and the settings of a tiny model of it.

    Attributes:
        title: its name in tables.
        model_type: Hugging Face's name of the architecture, or "native" for TransformerLens's own model.
        settings: of the config.
        task: what the model is for, as in the names of Hugging Face's auto classes; "" for an encoder without a head.
    """

    title: str
    model_type: str
    settings: dict[str, Any]
    task: str = "CausalLM"

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> TransformerBridge:
        """A tiny model with random weights, in eval mode.

        Args:
            dtype: of the weights.
            seed: of the weights.
            settings: in place of those of the table; `n_layers` is the number of layers whatever the config calls it.
        """
        if self.model_type == "native":
            config = TransformerBridgeConfig(**(self.settings | settings))
            native = TransformerBridge.boot_native(config, dtype=dtype)  # type: ignore[attr-defined]
            randomize(native.original_model, seed)
            return native.eval()
        if "n_layers" in settings:
            settings["num_hidden_layers"] = settings.pop("n_layers")
        task = getattr(transformers, f"AutoModelFor{self.task}" if self.task else "AutoModel")
        return bridged(task.from_config, AutoConfig.for_model(self.model_type, **(self.settings | settings)), dtype, seed=seed)


# Those of the page of families (python -m analyses.benchmarks.families).
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT-2", "gpt2", _GPT2),
    "neox_parallel": Family("GPT-NeoX, Pythia (parallel)", "gpt_neox", _SIZES | dict(use_parallel_residual=True, rotary_pct=0.5)),
    "neox_sequential": Family("GPT-NeoX (sequential)", "gpt_neox", _SIZES | dict(use_parallel_residual=False, rotary_pct=0.5)),
    "gptj": Family("GPT-J", "gptj", _GPT2 | dict(rotary_dim=2)),
    "opt": Family("OPT", "opt", _SIZES | dict(ffn_dim=24, word_embed_proj_dim=16)),
    "bloom": Family("Bloom", "bloom", dict(vocab_size=50, hidden_size=16, n_layer=2, n_head=4)),
    "llama": Family("Llama", "llama", _GROUPED),
    "mistral": Family("Mistral", "mistral", _GROUPED | dict(sliding_window=4)),
    "qwen2": Family("Qwen2", "qwen2", _GROUPED),
    "qwen3": Family("Qwen3", "qwen3", _HEAD_SIZE),
    "gemma": Family("Gemma 1", "gemma", _HEAD_SIZE),
    "gemma2": Family("Gemma 2", "gemma2", _HEAD_SIZE | _CAPS),
    "gemma3": Family("Gemma 3", "gemma3_text", _HEAD_SIZE | dict(sliding_window=4)),
    "phi3": Family("Phi-3", "phi3", _GROUPED),
    "olmo2": Family("OLMo 2", "olmo2", _GROUPED),
    "mixtral": Family("Mixtral", "mixtral", _GROUPED | dict(num_local_experts=4)),
    "qwen3_moe": Family("Qwen3-MoE", "qwen3_moe", _HEAD_SIZE | _MOE),
    "bert": Family("BERT (masked language model)", "bert", _SIZES, "MaskedLM"),
    "bert_classifier": Family("BERT (sequence classification)", "bert", _SIZES | dict(num_labels=3), "SequenceClassification"),
    "native": Family("native (LayerNorm)", "native", _NATIVE),
    "native_gated_rotary": Family(
        "native (RMSNorm, gated, rotary)",
        "native",
        _NATIVE | dict(normalization_type="RMS", gated_mlp=True, act_fn="silu") | dict(positional_embedding_type="rotary", rotary_dim=4),
    ),
    "t5": Family("T5", "t5", _T5, "Seq2SeqLM"),
    "bart": Family("BART", "bart", _BART, "Seq2SeqLM"),
    "vit": Family("ViT", "vit", _IMAGES, "ImageClassification"),
    "deit": Family("DeiT", "deit", _IMAGES | dict(architectures=[]), "ImageClassification"),  # of the two there are, that with one head
    "deepseek_v3": Family("DeepSeek-V3", "deepseek_v3", _SIZES | _LATENT | _ROUTED | dict(n_routed_experts=4, n_group=1)),
    "llava": Family(
        "LLaVA",
        "llava",
        dict(
            text_config=_GROUPED | dict(model_type="llama"),
            vision_config=_SIZES | dict(model_type="clip_vision_model", image_size=8, patch_size=4),
            image_token_id=49,
            image_seq_length=4,
        ),
        "ImageTextToText",
    ),
    "gpt_oss": Family("GPT-OSS", "gpt_oss", _HEAD_SIZE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "mamba": Family("Mamba", "mamba", dict(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)),
}

# Families that need no code of their own beside an entry somewhere, or not even that (--more prints their table).
MORE: dict[str, Family] = {
    **{name.lower(): Family(name, name.lower(), _GROUPED) for name in ("Apertus", "Arcee", "Cohere", "Cohere2", "Ernie4_5", "Exaone4")},
    **{name.lower(): Family(name, name.lower(), _GROUPED) for name in ("Granite", "Jais2", "Ministral3", "Nemotron", "Olmo", "Olmo3")},
    **{name.lower(): Family(name, name.lower(), _GROUPED) for name in ("Phi", "SmolLM3", "StableLm", "Starcoder2", "VaultGemma")},
    "seed_oss": Family("SeedOss", "seed_oss", _GROUPED),
    "glm": Family("Glm", "glm", _HEAD_SIZE),
    "glm4": Family("Glm4", "glm4", _HEAD_SIZE),
    "falcon": Family("Falcon", "falcon", _SIZES),
    "gpt_bigcode": Family("GPTBigCode", "gpt_bigcode", _GPT2),
    "gpt_neo": Family(
        "GPTNeo", "gpt_neo", _SIZES | dict(num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4)
    ),
    "olmoe": Family("Olmoe", "olmoe", _GROUPED | dict(num_experts=4, num_experts_per_tok=2)),
    "flex_olmo": Family("FlexOlmo", "flex_olmo", _GROUPED | dict(num_experts=4, num_experts_per_tok=2)),
    "glm4_moe": Family("Glm4Moe", "glm4_moe", _HEAD_SIZE | _ROUTED | dict(n_routed_experts=4, n_group=1)),
    "roberta": Family("Roberta", "roberta", _SIZES | dict(max_position_embeddings=40), "MaskedLM"),
    "bert_lm_head": Family("BERT as a decoder", "bert", _SIZES),
    "mt5": Family("MT5", "mt5", _T5, "Seq2SeqLM"),
    "mbart": Family("MBart", "mbart", _TRANSLATOR, "Seq2SeqLM"),
    "marian": Family("Marian", "marian", _TRANSLATOR, "Seq2SeqLM"),
    "pegasus": Family("Pegasus", "pegasus", _TRANSLATOR, "Seq2SeqLM"),
    "m2m_100": Family("M2M100", "m2m_100", _TRANSLATOR, "Seq2SeqLM"),
    "blenderbot": Family("Blenderbot", "blenderbot", _TRANSLATOR, "Seq2SeqLM"),
}

# TransformerLens's own model, by what differs from `_NATIVE`.
NATIVE_VARIANTS: dict[str, dict[str, Any]] = {
    "layer_norm": {},
    "rms_norm": dict(normalization_type="RMS", act_fn="silu"),
    "no_norm": dict(normalization_type=None),
    "gated": dict(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "attn_only": dict(attn_only=True),
    "rotary": dict(positional_embedding_type="rotary", rotary_dim=4),
    "gqa": dict(n_key_value_heads=2),
    "soft_caps": dict(attn_scores_soft_cap=2.0, output_logits_soft_cap=4.0),
}

# What only tests need.
VARIANTS: dict[str, Family] = {
    **{f"native_{name}": Family(f"native ({name})", "native", _NATIVE | settings) for name, settings in NATIVE_VARIANTS.items()},
    "flan_t5": Family("Flan-T5", "t5", _T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False), "Seq2SeqLM"),
    "bert_encoder": Family("BERT (no head)", "bert", _SIZES, ""),
    "qwen2_moe": Family("Qwen2-MoE", "qwen2_moe", _GROUPED | _MOE | dict(shared_expert_intermediate_size=12)),  # refused
}


def build(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> TransformerBridge:
    """A tiny model of a family of the table; see `Family.build`."""
    return (FAMILIES | MORE | VARIANTS)[family].build(dtype, seed, **settings)


def bridged(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> TransformerBridge:
    """A bridge over what `model_class(config)` gives, with random weights."""
    model = random_model(model_class, config, dtype, seed=seed)
    if isinstance(model, tuple(ENCODERS.values())):
        return bridge_encoder(model)
    return build_bridge_from_module(model, type(model).__name__, hf_config=config).eval()


def random_model(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> PreTrainedModel:
    """What `model_class(config)` gives, with random weights, in eval mode."""
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the default for mixtures of experts knows no float64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
    randomize(model, seed)
    model.to(dtype).eval()  # type: ignore[arg-type]
    return model


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> None:
    """Fill a module from a seeded normal: matrices around 0, norm weights around 1, biases and norm betas around 0 but not 0.

    Models start with biases at 0 and norm weights at 1, where an error in them would not show.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if parameter.ndim >= 2:
            parameter.copy_(noise * 0.3)
        else:
            parameter.copy_(0.2 * noise + (1 if name.endswith(("weight", ".w")) else 0))
