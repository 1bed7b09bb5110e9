"""Certified rankings: estimate all components, patch those on which the top k hangs, until it is settled ("screen, flag, fix").

The workflow is that of Zhang & Wang 2026 (arXiv 2606.09899; only the abstract was at hand); which component is patched next follows LUCB
(Kalyanakrishnan et al. 2012) for the best k of many: of those in the top the ones that could be weakest, and of the others the ones that
could be strongest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analyses.components import Direction

Array = np.ndarray
Patch = Callable[[Sequence[int]], Array]
"""Patches components, by their numbers, each on its own: effects [component, pair]."""


AT_ONCE = 4
"""Components of the top, and as many of the others, that are patched in one round: each round has to run the two unpatched runs again."""


@dataclass(frozen=True)
class Certificate:
    """What a certified top k rests on.

    Attributes:
        k: size of the top; direction: the yardstick.
        patched: how many components were patched, of n, in how many rounds.
    """

    k: int
    direction: Direction
    patched: int
    n: int
    rounds: int

    @property
    def forwards(self) -> int:
        """Forward passes over each pair: those patched, and in each round the two that are compared with."""
        return self.patched * self._directions + 2 * self.rounds

    @property
    def sweep(self) -> int:
        """The same for patching every component."""
        return self.n * self._directions + 2

    @property
    def _directions(self) -> int:
        return 2 if self.direction == "mean" else 1

    def __str__(self) -> str:
        yardstick = "the mean of denoising and noising" if self.direction == "mean" else self.direction
        return (
            f"top {self.k} settled for {yardstick}: {self.patched} of {self.n} patched, {self.forwards} of the {self.sweep} forwards of a "
            f"full sweep ({self.forwards / self.sweep:.0%}). Certain if the intervals of the {self.n - self.patched} others hold"
        )


def settle(low: Array, high: Array, score: Array, k: int, patch: Patch) -> tuple[dict[int, Array], int]:
    """Patch until the k largest magnitudes are known, if every interval holds.

    Known: no component outside the top can be larger than one in it. What has been patched is a point; the order within the top is not
    asked for.

    Args:
        low, high, score: intervals and scores, [component].
        patch: patches several components.

    Returns:
        Effects of each pair by the number of the component, for those that were patched; the number of rounds.
    """
    least = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    most, size = np.maximum(np.abs(low), np.abs(high)), np.abs(score).astype(float)
    effects: dict[int, Array] = {}
    rounds = 0
    while k < len(score):
        order = np.argsort(-size, kind="stable")
        top, others = order[:k], order[k:]
        weakest, strongest = top[np.argsort(least[top], kind="stable")], others[np.argsort(-most[others], kind="stable")]
        floor, ceiling = least[weakest[0]], most[strongest[0]]
        if floor >= ceiling:
            break
        open_top = [int(i) for i in weakest if least[i] < ceiling and i not in effects][:AT_ONCE]
        open_others = [int(i) for i in strongest if most[i] > floor and i not in effects][:AT_ONCE]
        chosen, rounds = open_top + open_others, rounds + 1
        for i, effect in zip(chosen, patch(chosen), strict=True):
            effects[i] = effect
            least[i] = most[i] = size[i] = abs(float(effect.mean()))
    return effects, rounds
