"""Prompts, or pairs of prompts, in batches of about 2048 tokens, for analyses that take either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, Target
from lens_relevance.inputs.metrics import by_position
from lens_relevance.inputs.prompt import Inputs, Prompt, tokenize
from lens_relevance.inputs.targets import AnyTarget, CallableTarget, as_target

_TOKENS_PER_PASS = 2048


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive prompts.

    Attributes:
        start: index of the first among all prompts.
        tokens, mask: ids, and 1 where they are real.
        target: what is explained, of these rows.
        reference: the corrupt prompts, where pairs were given.
    """

    start: int
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    target: AnyTarget | None
    reference: Int[Tensor, "batch pos"] | None


def batches(model: TransformerBridge, prompts: PromptPairs | Inputs, target: AnyTarget | None = None) -> Iterator[Batch]:
    """Batches of prompts (text or token ids, explained by `target`) or of pairs (clean against corrupt, with the target that they bring).

    Raises:
        RelevanceError: no prompts, or a target beside pairs.
    """
    if isinstance(prompts, PromptPairs):
        if target is not None:
            raise RelevanceError("pairs bring their own target; leave `target` out")
        tokens, mask, target, reference = prompts.clean, prompts.clean_mask, prompts.target, prompts.corrupt
    else:
        (tokens, mask), reference = tokenize(model, prompts), None
    if not len(tokens):
        raise RelevanceError("there are no prompts to look at")
    whole = None if target is None else as_target(target).made_for(len(tokens))
    size = max(1, _TOKENS_PER_PASS // tokens.shape[1])
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        of_rows = None if whole is None else whole.select(rows)
        yield Batch(start, tokens[rows], mask[rows], of_rows, None if reference is None else reference[rows])


def rows_together(
    model: TransformerBridge, target: Target, tokens: Int[Tensor, "n pos"], *, mask: Int[Tensor, "n pos"] | None, size: int
) -> int:
    """How many rows a batch that should have `size` has: all of them, where the target is a function that needs them together."""
    n = len(tokens)
    if not isinstance(target, CallableTarget) or n <= size:
        return min(size, n)
    half = slice(n // 2, n)
    hidden = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        logits = Prompt(tokens[:1], hidden[:1]).call(model)
    apart = target.select(half).metric(model, tokens[half], hidden[half]).gives_rows_apart(by_position(logits))
    return size if apart else n


def strings_of(model: TransformerBridge, tokens: Iterable[int]) -> list[str]:
    """Each token as text of its own; its id where the model has no tokenizer."""
    return [text_of(model, [int(token)]) for token in tokens]


def text_of(model: TransformerBridge, tokens: Sequence[int]) -> str:
    """Tokens as text; their ids where the model has no tokenizer."""
    ids = list(tokens)
    return " ".join(map(str, ids)) if getattr(model, "tokenizer", None) is None else str(model.tokenizer.decode(ids))
