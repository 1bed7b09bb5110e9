"""Fits words and sentences to the tokenizer at hand, so that the positions of every row of a task mean the same thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.errors import RelevanceError

# A word is looked up behind another one: tokenizers differ in what they do at the start of a text, and no prompt puts an answer there.
_WORD_BEFORE = "and"


def require_tokenizer(model: TransformerBridge, task: str) -> None:
    """Raises a RelevanceError that names `task` when the model has no tokenizer."""
    if model.tokenizer is None:
        raise RelevanceError(f"{task} writes English sentences and the model has no tokenizer; pass one when you boot the model")


def word_token(model: TransformerBridge, word: str) -> int | None:
    """The token id of `word` inside a sentence (after a space); None if the tokenizer splits it or does not know it."""
    before = model.to_tokens(_WORD_BEFORE, prepend_bos=False)[0].tolist()
    both = model.to_tokens(f"{_WORD_BEFORE} {word}", prepend_bos=False)[0].tolist()
    if both[:-1] != before or both[-1] == getattr(model.tokenizer, "unk_token_id", None):
        return None
    return int(both[-1])


def single_token_words(model: TransformerBridge, words: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """Splits `words` into those that are one token inside a sentence, with their ids, and those that are not.

    Two words with the same id (an uncased or a lossy tokenizer) would be one answer: the second is dropped too.
    """
    kept: dict[str, int] = {}
    dropped: list[str] = []
    for word in dict.fromkeys(words):
        token = word_token(model, word)
        if token is None or token in kept.values():
            dropped.append(word)
        else:
            kept[word] = token
    return kept, dropped


def token_lengths(model: TransformerBridge, texts: Sequence[str]) -> list[int]:
    """Number of tokens of each text as the model would read it, BOS included."""
    return [model.to_tokens(text, truncate=False).shape[1] for text in texts]


def most_common(lengths: Iterable[int]) -> int:
    """The most frequent length, the smaller one where two are equally frequent."""
    counts = Counter(lengths)
    return min(counts, key=lambda length: (-counts[length], length))


def knows(model: TransformerBridge, text: str) -> bool:
    """Whether the tokenizer has a token for every piece of `text`."""
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    return unknown is None or unknown not in model.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist()


def tokenize_rows(model: TransformerBridge, texts: Sequence[str]) -> Int[Tensor, "n pos"]:
    """Token ids of texts that all have the same number of tokens; a RelevanceError names the first that does not fit."""
    rows = [model.to_tokens(text, truncate=False)[0] for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) != len(rows[0]):
            raise RelevanceError(
                f"{text!r} has {len(row)} tokens where {texts[0]!r} has {len(rows[0])}: for this tokenizer the rows have different lengths"
            )
        if not knows(model, text):
            raise RelevanceError(f"the tokenizer does not know every word of {text!r}: {model.to_str_tokens(text, prepend_bos=False)}")
    tokens = torch.stack(rows)
    if tokens.shape[1] > model.cfg.n_ctx:
        raise RelevanceError(f"the prompts have {tokens.shape[1]} tokens and the model's context holds {model.cfg.n_ctx}")
    return tokens


def ends_differently(model: TransformerBridge, prompt: str, answer: str, wrong: str) -> tuple[list[int], int, int] | None:
    """A prompt up to the first token in which two continuations of it differ, and the two tokens there.

    Where a tokenizer makes the space before a word, or each digit of a number, a token of its own, what the continuations share belongs to
    the prompt.

    Returns:
        The prompt's ids, BOS included, the answer's token and the wrong one's; None where the continuations change how the prompt is split,
        do not differ, or hold words that the tokenizer does not know.
    """
    alone, right, other = (model.to_tokens(text, truncate=False)[0].tolist() for text in (prompt, prompt + answer, prompt + wrong))
    at = next((i for i, (a, b) in enumerate(zip(right, other, strict=False)) if a != b), None)
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if at is None or at < len(alone) or right[: len(alone)] != alone or (unknown is not None and unknown in (*right, *other)):
        return None
    return right[:at], right[at], other[at]
