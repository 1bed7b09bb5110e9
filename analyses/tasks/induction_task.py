"""Induction (Olsson et al. 2022, arXiv 2209.11895): "... A B ... A" -> B on random tokens, where nothing but the repetition helps."""

from __future__ import annotations

import random

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff


def induction(model: TransformerBridge, n: int = 32, seed: int = 0, *, length: int = 16) -> PromptPairs:
    """Random sequences of `length` tokens, followed by their first half again, which ends in A.

    Clean, `length` 8:   BOS x1 x2 x3 A B x6 D C | x1 x2 x3 A  ->  B
    Corrupt:             BOS x1 x2 x3 D B x6 A C | x1 x2 x3 A  ->  C

    The corruption changes the first occurrence of A: it trades places with a token D that is not repeated, so that another token follows
    A. Both the head that looks for the previous token and the one that copies see a difference, and both answers occur in both prompts.
    The target is logit(B) - logit(C). Rows have BOS (where the model uses one) and length + length // 2 tokens. Works without a tokenizer.

    Source: Olsson et al. 2022, arXiv 2209.11895; the corrupt prompt is ours.

    Raises:
        RelevanceError: `length` is under 6, over what the context holds, or over the size of the vocabulary.
    """
    if length < 6:
        raise RelevanceError(f"length must be at least 6 for two distinct continuations of A, got {length}")
    half = length // 2
    special = [] if model.tokenizer is None else model.tokenizer.all_special_ids
    size = model.cfg.d_vocab if model.tokenizer is None else min(model.cfg.d_vocab, len(model.tokenizer))
    vocabulary = sorted(set(range(size)) - set(special))
    start = [] if model.tokenizer is None else _bos(model)
    if len(start) + length + half > model.cfg.n_ctx:
        raise RelevanceError(
            f"length {length} makes prompts of {len(start) + length + half} tokens; the model's context holds {model.cfg.n_ctx}"
        )
    if len(vocabulary) < length:
        raise RelevanceError(f"length {length} needs as many different tokens and the vocabulary has {len(vocabulary)}")

    rng = random.Random(seed)
    clean, corrupt, answers, others = [], [], [], []
    for _ in range(n):
        first = rng.sample(vocabulary, length)
        a, d = half - 1, rng.randrange(half + 1, length - 1)
        changed = list(first)
        changed[a], changed[d] = first[d], first[a]
        clean.append(start + first + first[:half])
        corrupt.append(start + changed + first[:half])
        answers.append(first[a + 1])
        others.append(first[d + 1])
    device = model.cfg.device
    return PromptPairs(
        torch.tensor(clean, device=device),
        torch.tensor(corrupt, device=device),
        logit_diff(torch.tensor(answers), torch.tensor(others)),
    )


def _bos(model: TransformerBridge) -> list[int]:
    """What the model's tokenizer puts before every prompt, if anything."""
    with_bos, without = (model.to_tokens("and", prepend_bos=prepend)[0].tolist() for prepend in (None, False))
    return with_bos[: len(with_bos) - len(without)]
