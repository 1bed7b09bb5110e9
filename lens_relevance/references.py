"""What a run is compared with: other tokens, or the same positions with a baseline in place of the token embeddings.

A single prompt has no counterpart; `mean_embedding()` and `random_tokens()` stand in for one. BOS is kept as it is. A baseline so flat
that a norm's variance is not well above its eps makes 1/sqrt(variance) huge and the comparison meaningless; the engine refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.inputs import tokenize


@dataclass(frozen=True)
class ReferenceRun:
    """n reference runs per example, row by row: token ids, and embeddings that replace those of the tokens (or None).

    Rows are ordered example by example: the n references of the first example come first.
    """

    tokens: Int[Tensor, "rows pos"]
    embeddings: Float[Tensor, "rows pos d_model"] | None = None
    n: int = 1


@dataclass(frozen=True)
class Baseline:
    """A reference made for any prompt; see `mean_embedding`, `random_tokens`, `zero_embedding`."""

    kind: str
    n: int = 1
    seed: int = 0

    def run(self, model: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], tail: int = 0) -> ReferenceRun:
        """The reference runs for these prompts; the last `tail` tokens of each are part of the answer and stay."""
        replaced = _replaced(model, tokens, mask, tail)
        if self.kind == "random_tokens":
            generator = torch.Generator().manual_seed(self.seed)
            many = tokens.repeat_interleave(self.n, 0)
            allowed = _ordinary_tokens(model)
            drawn = allowed[torch.randint(len(allowed), many.shape, generator=generator)].to(tokens.device)
            return ReferenceRun(torch.where(replaced.repeat_interleave(self.n, 0), drawn, many), n=self.n)
        table = model.W_E.detach()
        baseline = table.mean(0) if self.kind == "mean_embedding" else torch.zeros_like(table[0])
        return ReferenceRun(tokens, torch.where(replaced.unsqueeze(-1), baseline, table[tokens]))

    def __str__(self) -> str:
        return f"random_tokens(n={self.n}, seed={self.seed})" if self.kind == "random_tokens" else f"{self.kind}()"


def mean_embedding() -> Baseline:
    """Every token embedding but BOS replaced by the mean over the vocabulary."""
    return Baseline("mean_embedding")


def zero_embedding() -> Baseline:
    """Every token embedding but BOS replaced by zeros. Without position embeddings this is degenerate, and refused when it is used."""
    return Baseline("zero_embedding")


def random_tokens(n: int = 8, seed: int = 0) -> Baseline:
    """Every token but BOS replaced by a random one; relevance is the average over n such references (n times the work, in one batch)."""
    if n < 1:
        raise RelevanceError(f"random_tokens needs at least one reference, got n={n}")
    return Baseline("random_tokens", n, seed)


def is_tokens(reference: Any) -> bool:
    """Whether a reference was given as text or token ids."""
    return isinstance(reference, str | list | tuple) or (isinstance(reference, Tensor) and not reference.is_floating_point())


def reference_tokens(model: Any, reference: Any, mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """Token ids of a reference for prompts with this mask; raises RelevanceError where the two do not fit."""
    given, given_mask = tokenize(model, reference)
    if given.shape != mask.shape:
        raise RelevanceError(
            f"the reference has shape {tuple(given.shape)}, the inputs {tuple(mask.shape)}: pass a reference of the same number of "
            "rows and tokens, or mean_embedding() or random_tokens() where the prompt has no counterpart"
        )
    if not isinstance(reference, Tensor) and not torch.equal(given_mask, mask):
        raise RelevanceError("the prompts and their references differ in length row by row; pair prompts of equally many tokens")
    return given


def reference_run(
    model: Any, reference: Any, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], tail: int = 0
) -> ReferenceRun:
    """A ReferenceRun from text, token ids, a Baseline or embeddings ([d_model] or [batch, pos, d_model]).

    The last `tail` tokens of each row stay as they are under a baseline.
    """
    if is_tokens(reference):
        return ReferenceRun(reference_tokens(model, reference, mask))
    if isinstance(reference, Baseline):
        return reference.run(model, tokens, mask, tail)
    if not isinstance(reference, Tensor):
        kind = type(reference).__name__
        raise RelevanceError(f"a reference is text, token ids, embeddings or a baseline such as mean_embedding(), not {kind}")
    table = model.W_E.detach()
    if reference.shape[-1] != table.shape[1]:
        raise RelevanceError(f"reference embeddings have {reference.shape[-1]} features, the model {table.shape[1]}")
    if reference.ndim == 1:
        return ReferenceRun(tokens, torch.where(_replaced(model, tokens, mask, tail).unsqueeze(-1), reference.to(table), table[tokens]))
    if reference.shape[:-1] != tokens.shape:
        raise RelevanceError(f"reference embeddings are {list(reference.shape)}; give [d_model] or {[*tokens.shape, table.shape[1]]}")
    return ReferenceRun(tokens, reference.to(table))


def _replaced(model: Any, tokens: Tensor, mask: Tensor, tail: int) -> Tensor:
    """True where a baseline takes the token's place: real tokens that are not BOS, nor among the last `tail`."""
    tokenizer = getattr(model, "tokenizer", None)
    bos = getattr(tokenizer, "bos_token_id", None)
    first = (mask.cumsum(1) == 1) & (mask == 1)
    prompt = (mask == 1) & (mask.cumsum(1) <= mask.sum(1, keepdim=True) - tail)
    return prompt & ~(first & (tokens == bos) if bos is not None else torch.zeros_like(first))


def _ordinary_tokens(model: Any) -> Tensor:
    """Token ids that a random prompt may hold: the vocabulary without special tokens."""
    everything = torch.arange(int(model.cfg.d_vocab))
    special = getattr(getattr(model, "tokenizer", None), "all_special_ids", []) or []
    keep = torch.ones_like(everything, dtype=torch.bool)
    keep[[i for i in special if i < len(everything)]] = False
    return everything[keep]
