"""Items: what a circuit is made of. Nodes are heads, MLPs and the embedding; edges lead from one of these to a reader.

Position embeddings and biases are no items: they are the same in both runs, so keeping or replacing them changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.edges.wiring import Wiring
from lens_relevance.errors import RelevanceError

Level = Literal["node", "edge"]
_SAME_IN_BOTH = ("pos_embed", "bias")


@dataclass(frozen=True, eq=False)
class Items:
    """All items of a model at one level, in the order of `frame`.

    Attributes:
        level: "node" or "edge".
        frame: columns node (and position), or source, target (and position).
        writers, readers: names, in the order of the model's computation.
        pos: how many positions have items of their own, or 1.
        index: [item, 2 or 3]: position, writer among `writers`, and for edges the reader among `readers`.
    """

    level: Level
    frame: pd.DataFrame
    writers: list[str]
    readers: list[str]
    pos: int
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.frame)

    def check_masks(self, kept: Bool[Tensor, "*_shape"]) -> None:
        """Refuse masks that do not have an entry for each item.

        Raises:
            RelevanceError: they have another shape than [circuit, item].
        """
        if kept.ndim != 2 or kept.shape[1] != len(self):
            raise RelevanceError(f"masks must have shape [circuit, {len(self)}], got {tuple(kept.shape)}")

    def spread(self, kept: Bool[Tensor, "circuit item"]) -> Bool[Tensor, "circuit pos writer *reader"]:
        """Masks over items as masks over [pos, writer] or [pos, writer, reader]; False where there is no item."""
        shape = (len(kept), self.pos, len(self.writers), *([len(self.readers)] if self.level == "edge" else []))
        result = torch.zeros(shape, dtype=torch.bool)
        result.movedim(0, -1)[tuple(torch.from_numpy(column) for column in self.index.T)] = kept.T
        return result

    def gather(self, scores: Float[Tensor, "batch pos writer *reader"], names: list[str]) -> Float[Tensor, "batch item"]:
        """Scores item by item, summed over positions where these have no items of their own.

        Args:
            scores: [batch, pos, writer] or [batch, pos, writer, reader].
            names: the writers of `scores`.
        """
        at = torch.tensor([names.index(writer) for writer in self.writers])[torch.from_numpy(self.index[:, 1])]
        summed = scores.sum(1, keepdim=True) if self.pos == 1 else scores
        where = (torch.from_numpy(self.index[:, 0]), at, *(torch.from_numpy(c) for c in self.index.T[2:]))
        return summed.movedim(0, -1)[where].T


def list_items(wiring: Wiring, level: Level, pos: int | None = None) -> Items:
    """The items of a model.

    Args:
        pos: how many positions have items of their own; None for items at all positions together.
    """
    writers = [name for name in wiring.writers if name not in _SAME_IN_BOTH]
    available = wiring.available()
    skipped = len(wiring.writers) - len(writers)
    if level == "node":
        pairs = np.arange(len(writers)).reshape(-1, 1)
    else:
        pairs = np.array([(w, r) for r, reader in enumerate(wiring.readers) for w in range(available[reader] - skipped)])
    positions = np.repeat(np.arange(pos or 1), len(pairs)).reshape(-1, 1)
    index = np.concatenate([positions, np.tile(pairs, (pos or 1, 1))], 1)
    columns: dict[str, object] = {"node" if level == "node" else "source": np.array(writers, dtype=object)[index[:, 1]]}
    if level == "edge":
        columns["target"] = np.array(wiring.readers, dtype=object)[index[:, 2]]
    if pos is not None:
        columns["position"] = index[:, 0]
    return Items(level, pd.DataFrame(columns), writers, wiring.readers, pos or 1, index)
