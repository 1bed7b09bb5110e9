"""Tiny models with random weights for tests, from the table in analyses/benchmarks/tiny_models.py, and a model that reads words.

Every builder takes `dtype` and `seed` and returns a `TransformerBridge` in eval mode without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2Config, GPT2LMHeadModel, PretrainedConfig, PreTrainedTokenizerFast

from analyses.benchmarks import tiny_models
from analyses.benchmarks.tiny_models import CONTEXT as N_CTX
from analyses.benchmarks.tiny_models import NATIVE_VARIANTS, randomize
from analyses.benchmarks.tiny_models import VOCABULARY as VOCAB_SIZE

__all__ = ["NATIVE_VARIANTS", "N_CTX", "VOCAB_SIZE", "random_tokens", "randomize"]


def random_tokens(batch: int = 2, pos: int = 6, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Token ids [batch, pos], uniform over the vocabulary."""
    return torch.randint(0, vocab_size, (batch, pos), generator=torch.Generator().manual_seed(seed))


def bridge_from_config(
    model_class: type[nn.Module], config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> TransformerBridge:
    """Any Hugging Face model class from its config class, with random weights, behind a bridge."""
    return tiny_models.bridged(model_class, config, dtype, seed=seed)


def _build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: object) -> TransformerBridge:
    return tiny_models.build(family, dtype, seed, **settings)


build_gpt2, build_llama, build_qwen3, build_gemma2, build_olmo2, build_native = (
    partial(_build, family) for family in ("gpt2", "llama", "qwen3", "gemma2", "olmo2", "native")
)


def build_neox(parallel: bool = True, dtype: torch.dtype = torch.float32, **settings: object) -> TransformerBridge:
    """GPT-NeoX (Pythia); attention and MLP read the same residual when `parallel`."""
    return _build("neox_parallel" if parallel else "neox_sequential", dtype, **settings)  # type: ignore[arg-type]


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
