"""Prompts to evaluate explanations on: pairs of a task that the model gets right, or prompts alone with what it predicts."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.perturbation.removal_runs import target_and_answer
from analyses.tasks import TASKS, PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, Prompt, tokenize
from lens_relevance.inputs.targets import TokenTarget, as_target, top_prediction
from lens_relevance.inputs.token_ids import token_ids

DEFAULTS = ("question_answering", "ioi", "pronoun")
"""Tasks to evaluate on where none is named: the first that fits the model's tokenizer and that it answers."""
_AT_ONCE = 32  # prompts
_MOST = 64  # rows are drawn for each that is wanted


@left_as_found
@torch.no_grad()
def answered(model: TransformerBridge, pairs: PromptPairs) -> Bool[Tensor, " n"]:
    """Which pairs the model gets right on both sides.

    Where the target is a difference of two tokens' logits: the answer is the most likely token after the clean prompt, and the wrong one
    after the corrupt prompt. With any other target: it is positive on the clean prompt and negative on the corrupt one.
    """
    right = []
    for batch in pairs.batches(_AT_ONCE):
        target = as_target(batch.target)
        sides = [Prompt(batch.clean, batch.clean_mask), Prompt(batch.corrupt, batch.corrupt_mask)]
        (clean, clean_end), (corrupt, corrupt_end) = (target_and_answer(model, target, side) for side in sides)
        if isinstance(target, TokenTarget) and target.wrong is not None:
            ends = ((clean_end, target.answer), (corrupt_end, target.wrong))
            named = [(end.unsqueeze(1) == token_ids(model, words, len(batch), what="answer")).any(1) for end, words in ends]
            right.append(named[0] & named[1])
        else:
            right.append((clean > 0) & (corrupt < 0))
    return torch.cat(right).cpu()


def answered_pairs(model: TransformerBridge, task: str | None = None, n: int = 16, *, seed: int = 0) -> tuple[PromptPairs, str]:
    """The first `n` pairs of a task that the model gets right on both sides, and in words which these are.

    Args:
        task: its name; the first of `DEFAULTS` that fits the model if left out.

    Raises:
        RelevanceError: an unknown task, one that does not fit the model, or one of which the model gets too few right.
    """
    if task is not None:
        if task not in TASKS:
            raise RelevanceError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
        pairs, tried = _drawn(model, task, n, seed=seed)
        return pairs, f"{n} prompts of the task {task}, those of the first {tried} that the model answers right"
    reasons = []
    for name in DEFAULTS:
        try:
            return answered_pairs(model, name, n, seed=seed)
        except RelevanceError as error:
            reasons.append(str(error))
    raise RelevanceError(f"no task fits this model: {'; '.join(reasons)}. Give prompts of your own")


def prompts_alone(model: TransformerBridge, prompts: Inputs) -> PromptPairs:
    """Prompts without counterparts, each with what the model predicts after it against the runner-up."""
    tokens, mask = tokenize(model, prompts)
    with torch.no_grad():
        target = top_prediction(Prompt(tokens, mask).call(model), tokens, mask)
    return PromptPairs(tokens, tokens, target, mask, mask)


def _drawn(model: TransformerBridge, task: str, n: int, *, seed: int) -> tuple[PromptPairs, int]:
    """The first n pairs of a task that the model gets right, and of how many."""
    size, found, tried, why = n, 0, 0, ""
    while size <= _MOST * n:
        try:
            pairs = TASKS[task](model, size, seed)
        except RelevanceError as error:
            if size == n:
                raise
            why = f" ({error})"
            break
        rows = answered(model, pairs).nonzero().flatten()
        if len(rows) >= n:
            return pairs[rows[:n]], int(rows[n - 1]) + 1
        found, tried, size = len(rows), size, 2 * size
    raise RelevanceError(
        f"the model gets {found} of {tried} pairs of the task {task} right on both sides, and {n} are asked for{why}: ask for fewer, "
        "choose another task, or give prompts of your own"
    )
