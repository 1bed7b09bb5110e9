"""For each unit the k windows with the highest and the lowest score, kept while a corpus goes by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NOTHING = -1
"""The window of a place that is still empty."""


@dataclass
class Extreme:
    """The k windows with the highest (sign 1) or lowest (sign -1) score of each unit, best first.

    Attributes:
        score: what is ranked by [unit, k]; other: the other measure of the same window; position: where the unit scores most there;
        window: the window's number, NOTHING where fewer than k were seen.
    """

    sign: int
    score: Float[Tensor, "unit k"]
    other: Float[Tensor, "unit k"]
    position: Int[Tensor, "unit k"]
    window: Int[Tensor, "unit k"]

    @classmethod
    def empty(cls, n_units: int, k: int, sign: int) -> Extreme:
        """Before the first window."""
        shape = (n_units, k)
        return cls(
            sign,
            torch.full(shape, -sign * torch.inf),
            torch.zeros(shape),
            torch.zeros(shape, dtype=torch.int32),
            torch.full(shape, NOTHING, dtype=torch.int64),
        )

    def add(
        self, score: Float[Tensor, "unit n"], other: Float[Tensor, "unit n"], position: Int[Tensor, "unit n"], window: Int[Tensor, "unit n"]
    ) -> None:
        """Take in further windows. Of equal scores the window with the lower number stays, whatever the order in which they come."""
        k = self.score.shape[1]
        changes = (self.sign * score >= self.sign * self.score[:, -1:]).any(1)  # fewer and fewer units as a corpus goes by
        joined = torch.cat([self.score[changes], score[changes]], 1)
        everything = {
            name: torch.cat([getattr(self, name)[changes], new[changes].to(getattr(self, name).dtype)], 1)
            for name, new in (("other", other), ("position", position), ("window", window))
        }
        by_number = everything["window"].sort(dim=1, stable=True).indices
        best = (self.sign * joined.gather(1, by_number)).sort(dim=1, descending=True, stable=True).indices
        order = by_number.gather(1, best)[:, :k]
        self.score[changes] = joined.gather(1, order)
        for name, values in everything.items():
            getattr(self, name)[changes] = values.gather(1, order)

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name."""
        return {name: getattr(self, name) for name in ("score", "other", "position", "window")}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in what another process has seen."""
        seen = state["window"] != NOTHING
        score = torch.where(seen, state["score"], -self.sign * torch.inf)
        self.add(score, state["other"], state["position"], state["window"])
