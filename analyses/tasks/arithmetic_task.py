"""Sums and differences of two numbers, as in MIB (Mueller et al. 2025, arXiv 2504.13151; the wording is ours): "47 + 21 =" -> "68"."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable

import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks.fitting import ends_differently, most_common, require_tokenizer
from analyses.tasks.pairs import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit_diff

NUMBERS = range(10, 100)
_TRIES = 50  # for each row


def arithmetic_addition(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Sums of two numbers of two digits; the corrupt prompt adds another second number.

    The target is logit(first token of the sum in which the two sums differ) - logit(the corrupt sum's). Sums have two digits and differ in
    the first, so that they differ at their first token also where each digit is a token.

    Source: MIB (Mueller et al. 2025, arXiv 2504.13151); the wording is ours.

    Raises:
        RelevanceError: the tokenizer splits numbers in ways that give the prompts different lengths.
    """
    return _pairs(model, n, seed, name="arithmetic_addition", sign="+", result=operator.add)


def arithmetic_subtraction(model: TransformerBridge, n: int = 32, seed: int = 0) -> PromptPairs:
    """Differences of two numbers of two digits, otherwise as `arithmetic_addition`.

    Source: MIB (Mueller et al. 2025, arXiv 2504.13151); the wording is ours.
    """
    return _pairs(model, n, seed, name="arithmetic_subtraction", sign="-", result=operator.sub)


def _pairs(model: TransformerBridge, n: int, seed: int, *, name: str, sign: str, result: Callable[[int, int], int]) -> PromptPairs:
    require_tokenizer(model, name)
    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int], int, int]] = []
    for _ in range(_TRIES * n):
        first, second, other = (rng.choice(NUMBERS) for _ in range(3))
        right, wrong = result(first, second), result(first, other)
        if right not in NUMBERS or wrong not in NUMBERS or right // 10 == wrong // 10:
            continue
        clean = ends_differently(model, f"{first} {sign} {second} =", f" {right}", f" {wrong}")
        corrupt = ends_differently(model, f"{first} {sign} {other} =", f" {right}", f" {wrong}")
        if clean is not None and corrupt is not None and clean[1:] == corrupt[1:] and len(clean[0]) == len(corrupt[0]):
            rows.append((clean[0], corrupt[0], clean[1], clean[2]))
        if len(rows) >= 2 * n:
            break
    length = most_common(len(row[0]) for row in rows) if rows else 0
    rows = [row for row in rows if len(row[0]) == length][:n]
    if len(rows) < n:
        raise RelevanceError(
            f"{name} does not fit this tokenizer: it writes '47 {sign} 21 = 68' as "
            f"{model.to_str_tokens(f'47 {sign} 21 = 68', prepend_bos=False)}, and only {len(rows)} of {n} prompts have one length"
        )
    prompts, corrupts, rights, wrongs = zip(*rows, strict=True)
    return PromptPairs(torch.tensor(prompts), torch.tensor(corrupts), logit_diff(torch.tensor(rights), torch.tensor(wrongs)))
