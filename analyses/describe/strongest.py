"""What descriptions of heads and of neurons have in common: the strongest rows over batches, and tokens at both ends of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import text_of
from lens_relevance import RelevanceError

TOKENS_SHOWN = 5


@dataclass
class Strongest:
    """The strongest rows so far, each with vectors that are needed once it is known which rows stay."""

    rows: pd.DataFrame
    vectors: dict[str, Float[Tensor, "n d_model"]]

    def merge(self, other: Strongest | None, by: str, top_k: int) -> Strongest:
        """The strongest of these rows and others, by the magnitude of a column."""
        if other is None:
            return self
        rows = pd.concat([other.rows, self.rows], ignore_index=True)
        kept = rows[by].abs().sort_values(ascending=False, kind="stable").index[:top_k]
        at = torch.tensor(list(kept))
        vectors = {name: torch.cat([other.vectors[name], self.vectors[name]])[at] for name in self.vectors}
        return Strongest(rows.loc[kept].reset_index(drop=True), vectors)


def check_top(top_k: int) -> None:
    """Refuse fewer rows than one."""
    if top_k < 1:
        raise RelevanceError(f"top_k is a number of rows, at least 1, not {top_k}")


def extremes(model: TransformerBridge, logits: Float[Tensor, " d_vocab"]) -> list[dict[str, Any]]:
    """The tokens at both ends."""
    rows = []
    for effect, sign in (("promotes", 1), ("suppresses", -1)):
        for rank, token in enumerate((sign * logits).topk(min(TOKENS_SHOWN, len(logits))).indices.tolist(), 1):
            rows.append({"effect": effect, "rank": rank, "token": text_of(model, [token]), "logit": float(logits[token])})
    return rows


def effects_in_words(writes: pd.DataFrame) -> dict[str, str]:
    """Both ends of what is written, in one line each."""
    return {effect: " ".join(writes.loc[writes["effect"] == effect, "token"].str.strip()) for effect in ("promotes", "suppresses")}
