"""Sums over pairs from which a ranking, its errors and its stability follow; nothing is kept per pair."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.components import Component
from analyses.evaluation.reliability import reliability
from analyses.evaluation.stability import Stability, from_sums, resampling_weights

_PARTS = ("mean", "deviations", "top", "resampled", "halves", "flipped", "estimates")
_NUMBERS = 2**23
"""Sums under choices of signs that are kept (64 MB). Of very many components fewer than 1000 choices are tried, 200 at least."""


class RankingSums:
    """Running sums over pairs.

    Args:
        top_k: what counts as "in the top" of a pair, of a resample and of a half.
        n: pairs in all, of all processes.
        first: the first pair that is added here; the others follow in order.
    """

    mean: Tensor
    deviations: Tensor
    top: Tensor
    resampled: Tensor
    halves: Tensor
    flipped: Tensor
    estimates: Tensor

    def __init__(self, top_k: int, n: int, first: int = 0) -> None:
        self.top_k, self.n, self.first, self.count = top_k, n, first, 0
        self._weights = [torch.from_numpy(weights) for weights in resampling_weights(n)]

    def add(self, scores: Float[Tensor, "batch estimate layer index"]) -> None:
        """Take in the scores of a batch, and after them the estimates of their bracket, of which only the sums are kept."""
        values = scores.detach().double().cpu()
        scores, estimates = values[:, 0], values[:, 1:].sum(0)
        flat, mean = scores.flatten(1), scores.mean(0)
        top = torch.zeros_like(flat).scatter_(1, flat.abs().topk(min(self.top_k, flat.shape[1])).indices, 1.0).sum(0).reshape(mean.shape)
        start = self.first + self.count
        flips = max(200, _NUMBERS // flat.shape[1])
        resampled, halves, flipped = (weights[:flips, start : start + len(flat)] @ flat for weights in self._weights)
        self.merge(
            {
                "count": torch.tensor(len(scores)),
                "mean": mean,
                "deviations": ((scores - mean) ** 2).sum(0),
                "top": top,
                "resampled": resampled,
                "halves": halves,
                "flipped": flipped,
                "estimates": estimates,
            }
        )

    def state(self) -> dict[str, Tensor]:
        """The sums so far, as tensors."""
        return {"count": torch.tensor(self.count), **{name: getattr(self, name) for name in _PARTS}} if self.count else {}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in the sums of other pairs."""
        count = int(state["count"])
        if not self.count:
            self.count = count
            for name in _PARTS:
                setattr(self, name, state[name])
            return
        # Chan et al. 1983: sums of squared deviations of two batches as one, without the cancellation of a plain sum of squares.
        total, change = self.count + count, state["mean"] - self.mean
        self.deviations = self.deviations + state["deviations"] + change**2 * self.count * count / total
        self.mean = self.mean + change * count / total
        self.top, self.count = self.top + state["top"], total
        for name in ("resampled", "halves", "flipped", "estimates"):
            setattr(self, name, getattr(self, name) + state[name])

    def stability(self) -> Stability:
        """Stability of the top over the pairs."""
        sizes = (weights.sum(1, keepdim=True) for weights in self._weights)
        resampled, halves = ((sums / size).numpy() for sums, size in zip((self.resampled, self.halves), sizes, strict=False))
        # One pair has no spread.
        return from_sums(resampled, halves, self.flipped.numpy() if self.count > 1 else np.full(self.flipped.shape, np.nan), self.top_k)

    def frame(self, kind: Component) -> pd.DataFrame:
        """A row per component, in order of layers: see `rank_heads`. `attrs` has its stability in words, and top_k."""
        layers, index = np.indices(self.mean.shape).reshape(2, -1)
        # One pair has no spread, and so no standard error.
        variance = self.deviations / (self.count - 1) if self.count > 1 else torch.full_like(self.mean, torch.nan)
        found = self.stability()
        frame = pd.DataFrame(
            {
                "layer": layers,
                kind.index: index,
                "score": self.mean.flatten().numpy(),
                "standard_error": (variance / self.count).sqrt().flatten().numpy(),
                "top_share": (self.top / self.count).flatten().numpy(),
                "top_frequency": found.frequency,
                "q_value": found.q_value,
            }
        )
        if len(self.estimates):
            estimates = (self.estimates / self.count).flatten(1).numpy()
            intervals = reliability(kind.name, frame["score"].to_numpy(), estimates)
            frame = frame.assign(low=intervals.low, high=intervals.high, reliable=intervals.reliable)
        frame.attrs |= {"stability": str(found), "top_k": self.top_k}
        return frame
