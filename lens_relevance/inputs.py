"""Prompts as tokens and a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_relevance.errors import RelevanceError

Inputs = str | Sequence[str] | Tensor


def tokenize(model: Any, inputs: Inputs, attention_mask: Tensor | None = None) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and mask (1 = real) of a prompt, several prompts, or ids [batch, pos] ([pos] is taken as one row).

    Strings get a BOS token as TransformerLens does by default and are padded on the right, where padding cannot reach a causal model's
    real tokens. Raises RelevanceError for an empty prompt, ids outside the vocabulary, or a mask of another shape.
    """
    device = next(model.parameters()).device
    if isinstance(inputs, str):
        inputs = [inputs]
    if isinstance(inputs, Tensor):
        tokens = inputs.to(device)
        tokens = tokens.unsqueeze(0) if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise RelevanceError(f"token ids must be integers [batch, pos], got {tokens.dtype} of shape {tuple(inputs.shape)}")
        if tokens.numel() == 0:
            raise RelevanceError("the prompt is empty: give at least one token")
        vocabulary = int(getattr(getattr(model, "cfg", None), "d_vocab", 2**62))
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise RelevanceError(f"token ids must lie in 0..{vocabulary - 1}, got {int(tokens.min())}..{int(tokens.max())}")
        check_length(model, tokens.shape[1])
        mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(device).long()
        if mask.shape != tokens.shape:
            raise RelevanceError(
                f"attention_mask has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}; give one entry per token"
            )
        if bool((mask.sum(1) == 0).any()):
            raise RelevanceError("attention_mask hides every token of a row")
        return tokens, mask
    if attention_mask is not None:
        raise RelevanceError("attention_mask goes with token ids; prompts given as strings are masked by us")
    if not isinstance(inputs, Sequence) or not inputs or not all(isinstance(text, str) for text in inputs):
        raise RelevanceError(f"inputs must be a string, strings, or token ids [batch, pos], got {type(inputs).__name__}")
    if getattr(model, "tokenizer", None) is None:
        raise RelevanceError("the model has no tokenizer; give token ids [batch, pos] instead of text")
    if any(not text for text in inputs):
        raise RelevanceError("the prompt is empty: give at least one word")
    return pad([model.to_tokens(text, truncate=False)[0] for text in inputs], model)


def check_length(model: Any, length: int) -> None:
    """Refuse prompts beyond the model's context."""
    n_ctx = getattr(getattr(model, "cfg", None), "n_ctx", None)
    if n_ctx is not None and length > n_ctx:
        raise RelevanceError(f"the prompt has {length} tokens, the model's context is {n_ctx}; shorten it")


def pad(rows: Sequence[Tensor], model: Any) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Rows of token ids as one tensor, padded on the right, and its mask."""
    length = max(len(row) for row in rows)
    check_length(model, length)
    filler = getattr(model.tokenizer, "pad_token_id", None) if getattr(model, "tokenizer", None) is not None else None
    tokens = torch.full((len(rows), length), filler or 0, dtype=torch.long, device=rows[0].device)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, 1
    return tokens, mask
