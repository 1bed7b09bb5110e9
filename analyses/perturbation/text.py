"""What a language model makes of a prompt from which tokens were removed, for several meanings of "removed"."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.perturbation.removal_runs import Removal, target_and_answer
from lens_relevance import RelevanceError, Target
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.references import mean_embedding, random_tokens, zero_embedding
from lens_relevance.inputs.targets import TokenTarget, as_target
from lens_relevance.sites import anatomy
from lens_relevance.sites.token_sets import TOKENS

BASELINES = ("mean_embedding", "zero_embedding", "random_tokens", "pad_token", "delete")


class TextRemoval(Removal):
    """Evaluates prompts without some of their tokens.

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
        self._embedding = anatomy(model).points[anatomy(model).leaves[0]].name
        if baseline != "delete":
            self._filler = self._fillers(seed)

    def run(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n pos"]) -> tuple[Tensor, Tensor]:
        """The target [n] and the most likely answer [n] of these prompts without these tokens."""
        gone = removed.to(self.tokens.device)
        return self._closed_up(rows, gone) if self.baseline == "delete" else self._filled(rows, gone)

    def parts(self, rows: Tensor, removed: Tensor) -> list[Tensor]:
        """Rows that close up must be of one length."""
        if self.baseline != "delete":
            return super().parts(rows, removed)
        left = (self.mask.cpu()[rows].bool() & ~removed).sum(1)
        return [p for n in left.unique() for p in (left == n).nonzero().flatten().split(self.batch_size)]

    def _filled(self, rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask, filler = self.tokens[rows], self.mask[rows], self._filler[rows]

        def replace(x: Tensor, hook: Any) -> Tensor:
            return torch.where(removed.unsqueeze(-1), filler.to(x), x)

        with self.model.hooks(fwd_hooks=[(self._embedding, replace)]):
            return self._forward(tokens, mask, rows)

    def _closed_up(self, rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        left = self.mask[rows].bool() & ~removed
        tokens = self.tokens[rows][left].reshape(len(rows), -1)
        return self._forward(tokens, torch.ones_like(tokens), rows)

    def _forward(self, tokens: Tensor, mask: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return target_and_answer(self.model, self.target.select(rows), Prompt(tokens, mask))

    def _fillers(self, seed: int) -> Tensor:
        """Embeddings [batch, pos, d_model] that take the place of removed tokens."""
        table = self.model.W_E.detach()
        if self.baseline == "pad_token":
            tokenizer = getattr(self.model, "tokenizer", None)
            token = getattr(tokenizer, "pad_token_id", None)
            token = getattr(tokenizer, "unk_token_id", None) if token is None else token
            if token is None:
                raise RelevanceError("the tokenizer has neither a pad nor an unk token; choose another baseline, e.g. 'mean_embedding'")
            return table[token].expand(*self.tokens.shape, -1)
        reference = {"mean_embedding": mean_embedding(), "zero_embedding": zero_embedding()}.get(self.baseline, random_tokens(1, seed))
        run = reference.run(self.model, Prompt(self.tokens, self.mask))
        if not run.embeddings:
            return table[run.prompt.tokens]
        where, baseline = run.embeddings[TOKENS]
        return torch.where(where.unsqueeze(-1), baseline, table[self.tokens])
