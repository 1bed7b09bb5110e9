"""Prompts, or pairs of prompts, in batches of about 2048 tokens, for analyses that take either."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, Target
from lens_relevance.inputs.prompt import Inputs, tokenize

_TOKENS_PER_PASS = 2048
AnyTarget = Target | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive prompts. start: index of the first among all prompts. reference: the corrupt prompts, where pairs were given."""

    start: int
    tokens: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    target: AnyTarget | None
    reference: Int[Tensor, "batch pos"] | None


def batches(model: Any, prompts: PromptPairs | Inputs, target: AnyTarget | None = None) -> Iterator[Batch]:
    """Batches of prompts (text or token ids, explained by `target`) or of pairs (clean against corrupt, with the target that they bring).

    A plain callable as target must not depend on which rows it sees. Raises RelevanceError for no prompts, and for a target beside pairs.
    """
    if isinstance(prompts, PromptPairs):
        if target is not None:
            raise RelevanceError("pairs bring their own target; leave `target` out")
        tokens, mask, target, reference = prompts.clean, prompts.clean_mask, prompts.target, prompts.corrupt
    else:
        (tokens, mask), reference = tokenize(model, prompts), None
    if not len(tokens):
        raise RelevanceError("there are no prompts to look at")
    size = max(1, _TOKENS_PER_PASS // tokens.shape[1])
    for start in range(0, len(tokens), size):
        rows = slice(start, start + size)
        of_rows = target.select(rows) if isinstance(target, Target) else target
        yield Batch(start, tokens[rows], mask[rows], of_rows, None if reference is None else reference[rows])


def text_of(model: Any, tokens: Sequence[int]) -> str:
    """Tokens as text; their ids where the model has no tokenizer."""
    ids = list(tokens)
    return " ".join(map(str, ids)) if getattr(model, "tokenizer", None) is None else str(model.tokenizer.decode(ids))
