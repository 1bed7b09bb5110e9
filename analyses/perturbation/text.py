"""What a language model makes of a prompt from which tokens were removed, for several meanings of "removed"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.perturbation.beginnings import can_share, end_logits
from analyses.perturbation.removal_runs import Removal, read_last, target_and_answer
from lens_relevance import RelevanceError, Target
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.references import mean_embedding, random_tokens, zero_embedding
from lens_relevance.inputs.targets import TokenTarget, as_target
from lens_relevance.sites import anatomy
from lens_relevance.sites.token_sets import TOKENS

BASELINES = ("mean_embedding", "zero_embedding", "random_tokens", "pad_token", "delete")


class TextRemoval(Removal):
    """Evaluates prompts without some of their tokens.

    Source: ours; which of these baselines a paper has used differs from paper to paper.

    Args:
        baseline: what stands where a token was removed: the mean embedding of the vocabulary, a zero embedding, a random token (one draw
            per position, the same for every method and order), the tokenizer's pad (or unk) token, or nothing at all (`delete`: the tokens
            that are left move together, so it needs a target at a position counted from the end).
        seed: of the random tokens.
        batch_size: rows per forward pass.
    """

    def __init__(
        self,
        model: TransformerBridge,
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"],
        *,
        target: Target,
        baseline: str,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        if baseline not in BASELINES:
            raise RelevanceError(f"unknown baseline {baseline!r}; choose one of {', '.join(BASELINES)}")
        if baseline == "delete" and not (isinstance(target, TokenTarget) and target.position == -1):
            raise RelevanceError(
                "the baseline 'delete' moves tokens, so the target must be a logit, logit_diff or log_prob at the last position (-1)"
            )
        self.model, self.tokens, self.mask, self.target = model, tokens, mask, as_target(target).made_for(len(tokens))
        super().__init__(baseline, batch_size)
        self._embedding = anatomy(model).leaves[0]
        self._other, self._filler, self._replaceable = self._fillers(seed)
        self._shares = can_share(model)
        self._compared = False

    def run(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n pos"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The target [n] and the most likely answer [n] of these prompts without these tokens, run as they are."""
        left = self._without(rows, removed)

        def replace(x: Tensor, hook: Any) -> Tensor:
            return x if self._filler is None else torch.where(left.filled.unsqueeze(-1), self._filler.to(x), x)

        with self.model.hooks(fwd_hooks=[(self._embedding, replace)]):
            return target_and_answer(self.model, self.target.select(rows), Prompt(left.tokens, left.mask))

    def parts(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n pos"]) -> list[Int[Tensor, " _part"]]:
        """Rows that close up must be of one length."""
        if self.baseline != "delete":
            return super().parts(rows, removed)
        left = (self.mask.cpu()[rows].bool() & ~removed).sum(1)
        return [p for n in left.unique() for p in (left == n).nonzero().flatten().split(self.batch_size)]

    def _evaluate(self, rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        """What several of these prompts begin with is run once, where the model can, and gives the same as a plain forward."""
        value, predicted = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.long)
        for part in _sorted(rows, removed).split(self.batch_size):
            left = self._without(rows[part], removed[part])
            if not (self._shares and self._reads_end(rows[part], left)):
                return super()._evaluate(rows, removed)
            ends = end_logits(self.model, left.tokens, left.mask.sum(1), filled=left.filled, filler=self._filler, embedding=self._embedding)
            for ended, logits in ends:
                metric = self.target.select(rows[part[ended]]).metric(self.model, left.tokens[ended], left.mask[ended]).of_read()
                value[part[ended]] = metric(logits).expand(len(ended)).double().cpu()
                predicted[part[ended]] = logits[:, -1].argmax(-1).cpu()
            if not self._compared:
                one = part[-1:]
                self._compared = True
                self._shares = _close(value[one], super()._evaluate(rows[one], removed[one])[0], self.model.W_E.dtype)
        return (value, predicted) if self._shares else super()._evaluate(rows, removed)

    def _reads_end(self, rows: Tensor, left: _Left) -> bool:
        """Whether the target and the answer are read at the last token of each row, and padding follows it."""
        end = left.mask.sum(1, keepdim=True) - 1
        at = self.target.select(rows).metric(self.model, left.tokens, left.mask).at
        reads = at is not None and torch.equal(at.to(end.device), end) and torch.equal(read_last(self.target, left.tokens, left.mask), end)
        return reads and bool((left.mask.diff(dim=1) <= 0).all())

    def _without(self, rows: Tensor, removed: Tensor) -> _Left:
        """These prompts without these tokens; `delete` closes up what is left, padded on the right."""
        tokens, mask, gone = self.tokens[rows], self.mask[rows], removed.to(self.tokens.device)
        nowhere = torch.zeros_like(gone)
        if self.baseline == "delete":
            kept = mask.bool() & ~gone
            order = (~kept).sort(dim=1, stable=True).indices[:, : int(kept.sum(1).max())]
            return _Left(tokens.gather(1, order), kept.gather(1, order).long(), nowhere[:, : order.shape[1]])
        gone = gone & self._replaceable[rows]
        if self._other is None:
            return _Left(tokens, mask, gone)
        return _Left(torch.where(gone, self._other[rows], tokens), mask, nowhere)

    def _fillers(self, seed: int) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """What takes the place of removed tokens: other ids [batch, pos] or an embedding [d_model]; and where it may [batch, pos]."""
        anywhere = torch.ones_like(self.tokens, dtype=torch.bool)
        if self.baseline == "delete":
            return None, None, anywhere
        if self.baseline == "pad_token":
            tokenizer = getattr(self.model, "tokenizer", None)
            token = getattr(tokenizer, "pad_token_id", None)
            token = getattr(tokenizer, "unk_token_id", None) if token is None else token
            if token is None:
                raise RelevanceError("the tokenizer has neither a pad nor an unk token; choose another baseline, e.g. 'mean_embedding'")
            return torch.full_like(self.tokens, token), None, anywhere
        reference = {"mean_embedding": mean_embedding(), "zero_embedding": zero_embedding()}.get(self.baseline, random_tokens(1, seed))
        run = reference.run(self.model, Prompt(self.tokens, self.mask))
        if not run.embeddings:
            return run.prompt.tokens, None, anywhere
        where, vector = run.embeddings[TOKENS]
        return None, vector, where


@dataclass(frozen=True)
class _Left:
    """Prompts after a removal: ids and mask [row, pos], and where an embedding is replaced."""

    tokens: Int[Tensor, "row pos"]
    mask: Int[Tensor, "row pos"]
    filled: Bool[Tensor, "row pos"]


def _sorted(rows: Tensor, removed: Tensor) -> Tensor:
    """An order of removals in which those that begin alike are neighbours."""
    keys = torch.cat([rows.unsqueeze(1), removed.cpu().long()], 1)
    return torch.from_numpy(np.lexsort(keys.flip(1).T.numpy()))


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    precision = torch.finfo(dtype).eps ** 0.5
    return torch.allclose(one, other, rtol=precision, atol=precision)
