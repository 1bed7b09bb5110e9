"""Tiny models with random weights, one builder per family, for tests that compare with closed forms.

Every builder takes `dtype` and `seed` and returns a `TransformerBridge` in eval mode without a tokenizer.
All biases, norm weights and norm betas are drawn from a normal: Hugging Face starts them at 0 or 1, where an error in a bias or norm term
is invisible.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 50
N_CTX = 32


@torch.no_grad()
def randomize(module: nn.Module, seed: int, weight_std: float = 0.3) -> None:
    """Fill every parameter in place from a seeded normal: matrices around 0, norm weights around 1, biases and betas around 0 but not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if parameter.ndim >= 2:
            parameter.copy_(noise * weight_std)
        elif name.endswith("weight") or name.endswith(".w"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.2 * noise)


def random_tokens(batch: int = 2, pos: int = 6, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Token ids [batch, pos], uniform over the vocabulary."""
    return torch.randint(0, vocab_size, (batch, pos), generator=torch.Generator().manual_seed(seed))


def bridge_from_config(
    model_class: type[nn.Module], config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformerBridge:
    """Any Hugging Face model class from its config class, with random weights, behind a bridge."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)  # type: ignore[call-arg]
    randomize(model, seed)
    model.to(dtype).eval()
    return build_bridge_from_module(model, model_class.__name__, hf_config=config).eval()


def build_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object) -> TransformerBridge:
    """GPT-2: LayerNorm, learned positions, GELU, fused qkv."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB_SIZE, n_positions=N_CTX, n_embd=16, n_layer=n_layers, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return bridge_from_config(GPT2LMHeadModel, GPT2Config(**(settings | overrides)), dtype, seed)


def build_neox(
    parallel: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object
) -> TransformerBridge:
    """GPT-NeoX (Pythia): LayerNorm, partial rotary positions; attention and MLP read the same residual when `parallel`."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=N_CTX,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        use_parallel_residual=parallel,
        rotary_pct=0.5,
    )
    return bridge_from_config(GPTNeoXForCausalLM, GPTNeoXConfig(**(settings | overrides)), dtype, seed)


def build_llama(dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object) -> TransformerBridge:
    """Llama: RMSNorm, rotary positions, SwiGLU, grouped-query attention (4 heads on 2 key-value heads)."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=N_CTX,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return bridge_from_config(LlamaForCausalLM, LlamaConfig(**(settings | overrides)), dtype, seed)


def _llama_like(n_layers: int, overrides: dict[str, object]) -> dict[str, object]:
    """Sizes that the families of the Llama type share."""
    settings: dict[str, object] = dict(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=N_CTX,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    return settings | overrides


def build_qwen3(dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object) -> TransformerBridge:
    """Qwen3: Llama with an RMSNorm on each head's queries and keys (q_norm, k_norm)."""
    return bridge_from_config(Qwen3ForCausalLM, Qwen3Config(**_llama_like(n_layers, overrides)), dtype, seed)


def build_gemma2(dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object) -> TransformerBridge:
    """Gemma 2: soft-caps on scores and logits (small enough to bite), norms before and after each sublayer, local and global layers."""
    caps: dict[str, object] = dict(attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=8, sliding_window=4)
    return bridge_from_config(Gemma2ForCausalLM, Gemma2Config(**_llama_like(n_layers, caps | overrides)), dtype, seed)


def build_olmo2(dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object) -> TransformerBridge:
    """OLMo 2: norms after each sublayer only, and on all queries and keys at once."""
    settings = _llama_like(n_layers, overrides)
    del settings["head_dim"]
    return bridge_from_config(Olmo2ForCausalLM, Olmo2Config(**settings), dtype, seed)


def build_native(dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 2, **overrides: object) -> TransformerBridge:
    """TransformerLens's own model; see `NATIVE_VARIANTS` for the variants the tests run over."""
    settings: dict[str, object] = dict(
        d_model=16,
        d_head=4,
        n_heads=4,
        n_layers=n_layers,
        n_ctx=N_CTX,
        d_vocab=VOCAB_SIZE,
        d_mlp=32,
        act_fn="gelu",
        normalization_type="LN",
    )
    config = TransformerBridgeConfig(**(settings | overrides))
    bridge = TransformerBridge.boot_native(config, dtype=dtype)
    randomize(bridge.original_model, seed)
    return bridge.eval()


def build_with_words(folder: Path, words: Iterable[str], n_ctx: int = N_CTX) -> TransformerBridge:
    """A tiny GPT-2 with a tokenizer that has exactly these words (each with and without a leading space, as GPT-2's) and pairs of digits.

    It is written to `folder` and booted from there, as a user boots a model.
    """
    special = ["<|endoftext|>", "<unk>"]
    known = [",", ".", *(space + text for text in [*dict.fromkeys(words), *(f"{i:02d}" for i in range(100))] for space in ("", " "))]
    vocabulary = {token: i for i, token in enumerate([*special, *known])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\d\d| ?[A-Za-z]+|[^\w\s]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    roles = dict(bos_token=special[0], eos_token=special[0], unk_token=special[1])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    config = GPT2Config(vocab_size=len(vocabulary), n_positions=n_ctx, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    randomize(model, seed=0)
    model.save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder)).eval()


NATIVE_VARIANTS: dict[str, dict[str, object]] = {
    "layer_norm": dict(normalization_type="LN"),
    "rms_norm": dict(normalization_type="RMS", act_fn="silu"),
    "no_norm": dict(normalization_type=None),
    "gated": dict(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "attn_only": dict(attn_only=True),
    "rotary": dict(positional_embedding_type="rotary", rotary_dim=4),
    "gqa": dict(n_key_value_heads=2),
    "soft_caps": dict(attn_scores_soft_cap=2.0, output_logits_soft_cap=4.0),
}
