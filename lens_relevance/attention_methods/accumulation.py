"""How the layers' attention becomes relevance of tokens for tokens: as a chain of matrices, or as a sum of maps.

Every method gives one of these two (attention flow has its own); scores, matrix, per-layer matrices and per-head scores follow from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Accumulation(ABC):
    """What TokenRelevance reads; nothing is computed before it is asked for."""

    @abstractmethod
    def scores(self) -> Float[Tensor, "batch source"]:
        """Relevance of each token for the explained row."""

    @abstractmethod
    def matrix(self) -> Float[Tensor, "batch token source"]:
        """Relevance of each source for every token."""

    @abstractmethod
    def layers(self) -> Float[Tensor, "batch layer token source"]:
        """The same for each layer alone."""

    @abstractmethod
    def heads(self) -> Float[Tensor, "batch layer head"]:
        """What each head passes on to the scores."""


@dataclass(frozen=True)
class Step:
    """One layer of a chain: R <- diag(kept) R + sum_h parts_h R."""

    kept: Float[Tensor, "batch token"]
    parts: Float[Tensor, "batch head token source"]

    def matrix(self) -> Float[Tensor, "batch token source"]:
        return torch.diag_embed(self.kept) + self.parts.sum(1)


@dataclass(frozen=True)
class Chain(Accumulation):
    """R_l = M_l R_{l-1}, R_0 = I, over steps[0] (the lowest layer) to the last; `start` is the explained row e_t."""

    steps: Sequence[Step]
    start: Float[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]

    def rows(self) -> list[Float[Tensor, "batch token"]]:
        """r_L = e_t and r_{l-1} = r_l M_l, from the top downward: row l is the explained row before layer l is unrolled."""
        rows = [self.start]
        for step in reversed(self.steps):
            rows.append(rows[-1] * step.kept + torch.einsum("bt,bhts->bs", rows[-1], step.parts))
        return rows[::-1]

    def scores(self) -> Float[Tensor, "batch source"]:
        return self.rows()[0] * self.mask

    def matrix(self) -> Float[Tensor, "batch token source"]:
        result = torch.diag_embed(self.mask.to(self.start.dtype))
        for step in self.steps:
            result = step.kept.unsqueeze(-1) * result + step.parts.sum(1) @ result
        return result

    def layers(self) -> Float[Tensor, "batch layer token source"]:
        real = self.mask[:, None, :, None] & self.mask[:, None, None, :]
        return torch.stack([step.matrix() for step in self.steps], 1) * real

    def heads(self) -> Float[Tensor, "batch layer head"]:
        """sum_j [r_l parts_{l,h} R_{l-1}]_j. Only the row sums of R_{l-1} are needed, and they obey the same recursion."""
        below, shares = self.mask.to(self.start.dtype), []
        for row, step in zip(self.rows()[1:], self.steps, strict=True):
            shares.append(torch.einsum("bt,bhts,bs->bh", row, step.parts, below))
            below = step.kept * below + torch.einsum("bhts,bs->bt", step.parts, below)
        return torch.stack(shares, 1)


@dataclass(frozen=True)
class Total(Accumulation):
    """A sum over layers and heads of maps [batch, head, token, source]; `rows` says how much of each token's row goes into the scores."""

    maps: Sequence[Float[Tensor, "batch head token source"]]
    rows: Float[Tensor, "batch token"]

    def scores(self) -> Float[Tensor, "batch source"]:
        return torch.einsum("bt,bts->bs", self.rows, self.matrix())

    def matrix(self) -> Float[Tensor, "batch token source"]:
        return self.layers().sum(1)

    def layers(self) -> Float[Tensor, "batch layer token source"]:
        return torch.stack([one.sum(1) for one in self.maps], 1)

    def heads(self) -> Float[Tensor, "batch layer head"]:
        return torch.stack([torch.einsum("bt,bhts->bh", self.rows, one) for one in self.maps], 1)
