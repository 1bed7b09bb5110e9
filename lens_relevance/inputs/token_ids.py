"""The tokens and positions that targets name: strings and numbers as ids, and positions counted among each row's real tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, has_tokenizer
from lens_relevance.inputs.class_labels import class_names, class_number

Tokens = Any  # str | int | sequence of them | Int[Tensor, "batch"]; checked by token_ids with messages of its own


def token_ids(model: HookedModel, tokens: Tokens, batch: int, *, what: str) -> Int[Tensor, "batch n"]:
    """Token ids, one row per example; each string must be a single token."""
    if isinstance(tokens, str | int) or (isinstance(tokens, Tensor) and tokens.ndim == 0):
        tokens = [tokens] * batch
    if isinstance(tokens, Tensor):
        tokens = tokens.tolist()
    if len(tokens) == 1 and batch > 1:
        tokens = list(tokens) * batch
    if len(tokens) != batch:
        raise RelevanceError(f"{what}: {len(tokens)} given for {batch} example(s); give one per example, or one for all")
    rows = [[single_token(model, t, what) for t in (row if isinstance(row, list | tuple) else [row])] for row in tokens]
    if len({len(row) for row in rows}) > 1:
        raise RelevanceError(f"{what}: every example needs the same number of tokens, got {[len(row) for row in rows]}")
    return torch.tensor(rows, dtype=torch.long, device=device_of(model))


def single_token(model: HookedModel, token: str | int | Tensor, what: str = "token") -> int:
    """The id of one token, or the number of a classifier's class; a string of several pieces is refused with the pieces shown."""
    classes = class_names(model)
    if classes is not None:
        return class_number(classes, token, what)
    vocabulary = int(getattr(getattr(model, "cfg", None), "d_vocab", 2**62))
    if isinstance(token, str):
        if not has_tokenizer(model):
            raise RelevanceError(f"{what} {token!r}: the model has no tokenizer; give token ids")
        ids = model.to_tokens(token, prepend_bos=False)[0].tolist()
        if len(ids) != 1 and (word := _word_of_sentencepiece(model.tokenizer, token)) is not None:
            return word
        if len(ids) != 1:
            pieces = [model.tokenizer.decode([i]) for i in ids]
            raise RelevanceError(
                f"{what} {token!r} is {len(ids)} tokens {pieces}; give one of them (often with a leading space), "
                "or continuation(...) for an answer of several tokens"
            )
        if model.tokenizer.unk_token_id is not None and ids[0] == model.tokenizer.unk_token_id:
            raise RelevanceError(f"{what} {token!r} is not in the vocabulary of this tokenizer")
        return int(ids[0])
    index = int(token)
    if not 0 <= index < vocabulary:
        raise RelevanceError(f"{what} id {index} is outside the vocabulary of {vocabulary}")
    return index


def _word_of_sentencepiece(tokenizer: Any, token: str) -> int | None:
    """The id of " word" where the tokenizer adds a space of its own in front of a text (Llama's SentencePiece), so that it reads two.

    Its vocabulary writes that token "\u2581word". None where there is no such token.
    """
    if not token.startswith(" ") or token == " ":
        return None
    piece = "\u2581" + token[1:].replace(" ", "\u2581")
    index = tokenizer.convert_tokens_to_ids(piece)
    return int(index) if isinstance(index, int) and tokenizer.convert_ids_to_tokens(index) == piece else None


def positions(position: int, tokens: Tensor, attention_mask: Tensor | None) -> Int[Tensor, " batch"]:
    """Index of the position-th real token of each row; negative positions count from the end."""
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens.device).long()
    real = mask.sum(1)
    wanted = position if position >= 0 else real + position
    if bool(((torch.as_tensor(wanted) < 0) | (torch.as_tensor(wanted) >= real)).any()):
        raise RelevanceError(f"position {position} is outside the prompt: rows have {sorted(set(real.tolist()))} real tokens")
    return ((mask.cumsum(1) == (torch.as_tensor(wanted, device=tokens.device) + 1).reshape(-1, 1)) & (mask == 1)).long().argmax(1)


def text_ids(model: HookedModel, text: str) -> Int[Tensor, " pos"]:
    """The token ids of a text."""
    if not has_tokenizer(model):
        raise RelevanceError(f"{text!r}: the model has no tokenizer; give token ids")
    return model.to_tokens(text, prepend_bos=False)[0]


def device_of(model: HookedModel) -> torch.device:
    return next(model.parameters()).device
