"""How far a score can be from what patching would show: an interval around it, and whether that interval is narrow.

Several estimates of the same effect are right under different conditions: the secant where things saturate, the tangents where a component
acts through products with others, the second order where curvature is mild. Where all of them agree the effect is known; where they differ
it lies somewhere around them. How far around was calibrated against exhaustive patching (docs/measurements/reliability.md): an interval
that is promised nothing by theory, and holds the patched value as often as is measured there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

WIDTH = {"resid": 0.5, "mlp": 0.5, "attn": 1.0, "neurons": 0.4, "q": 0.75, "k": 0.75, "heads": 1.0, "v": 1.0}
"""Half of an interval, as a multiple of the largest distance from the score to one of the estimates.

Calibrated on the embedded model (ioi, induction) and stories260k (pronoun): at least the factor at which 90 % of the patched values are
inside in the worst of the three (heads .51, v .65, q .61, k .73, neurons .39, all others below .1), and more where it is small: heads,
values and attention outputs, which lie between secant and tangent, have 1.
"""
FLOOR = 0.01
"""Added to half of every interval, as a share of the largest score: effects below are rounding and chance.

Not where every estimate is exactly 0: such a component is the same in both runs, or nothing reads it, and patching it does nothing.
"""
_ROUNDING = 1e-5  # of patched runs, as a share of the largest effect
WRONG = 0.2
"""A score is wrong that is off by more than this share of the largest effect."""
FLAGGED = 0.1
"""A score is flagged, as not reliable, if its interval reaches further than this share of the largest score: half of what counts as wrong,
since an interval may miss. Chosen where the widths were: the largest of 20, 15, 12.5, 10, 7.5 and 5 % that flags all that is wrong there.
"""


@dataclass(frozen=True)
class Reliability:
    """Intervals of scores.

    Attributes:
        low, high: ends of the interval in which the patched value is to be expected, [component], in the units of the target.
        reliable: whether both are within 10 % of the largest magnitude of all scores, [component].
    """

    low: Array
    high: Array
    reliable: Array


def reliability(kind: str, score: Array, estimates: Array) -> Reliability:
    """Intervals around scores of one kind of component.

    score +- (WIDTH[kind] * largest |estimate - score| + FLOOR * largest |score| of all components).

    Args:
        kind: its name (`analyses.components`).
        score: mean over pairs, [component].
        estimates: other estimates of the same means, [estimate, component]: those of `Estimator.bracket`.
    """
    largest = float(np.abs(score).max(initial=0.0))
    half = WIDTH[kind] * np.abs(estimates - score).max(0) + FLOOR * largest * (estimates != 0).any(0)
    return Reliability(score - half, score + half, half <= FLAGGED * largest)


@dataclass(frozen=True)
class Coverage:
    """How intervals and flags did against patching.

    Attributes:
        inside: share of components whose patched value is in its interval.
        flagged: share of components whose score is not reliable.
        wrong: share of components whose score is off by more than 20 % of the largest effect; recall: share of these that are flagged, NaN
            where there are none.
        n: number of components.
    """

    inside: float
    flagged: float
    wrong: float
    recall: float
    n: int

    def __str__(self) -> str:
        found = "none is" if np.isnan(self.recall) else f"{self.wrong:.1%} are, and {self.recall:.0%} of them are flagged"
        return (
            f"{self.inside:.0%} of {self.n} intervals hold the patched value; {self.flagged:.0%} of the scores are flagged as unreliable "
            f"(off by more than 20 % of the largest effect: {found})"
        )


def coverage(found: Reliability, score: Array, patched: Array) -> Coverage:
    """Intervals and flags against the patched effects, all [component]; components without an effect (NaN) are left out."""
    there, rounding = ~np.isnan(patched), _ROUNDING * np.nanmax(np.abs(patched), initial=0.0)
    low, high, reliable, score, patched = (values[there] for values in (found.low, found.high, found.reliable, score, patched))
    wrong = np.abs(score - patched) > WRONG * np.abs(patched).max(initial=0.0)
    return Coverage(
        inside=float(((patched >= low - rounding) & (patched <= high + rounding)).mean()),
        flagged=float((~reliable).mean()),
        wrong=float(wrong.mean()),
        recall=float((~reliable)[wrong].mean()) if wrong.any() else float("nan"),
        n=len(patched),
    )
