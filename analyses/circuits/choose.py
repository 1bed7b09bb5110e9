"""From scores to a circuit: the best n, those that stay the best on other pairs, all above a threshold, or grown from the logits."""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool

from analyses.circuits.items import Items
from analyses.circuits.scores import ItemScores, Order
from analyses.components import LOGITS, owner
from lens_relevance.errors import RelevanceError


@dataclass(frozen=True, eq=False)
class Circuit:
    """A choice of items.

    Attributes:
        kept: True at the items of the circuit, [item], in the order of `items.frame`.
    """

    items: Items
    kept: Bool[np.ndarray, " item"]

    def __len__(self) -> int:
        return int(self.kept.sum())

    def to_frame(self) -> pd.DataFrame:
        """The items of the circuit."""
        return self.items.frame[self.kept].reset_index(drop=True)


def ranking(scores: ItemScores, order: Order) -> np.ndarray:
    """Indices of items, best first; ties stay in the order of the items."""
    return np.argsort(-scores.values(order), kind="stable")


def top(scores: ItemScores, n: int, order: Order = "absolute") -> Circuit:
    """The n best items.

    Raises:
        RelevanceError: n is not among 1 and the number of items.
    """
    if not 1 <= n <= len(scores.items):
        raise RelevanceError(f"a circuit has 1 to {len(scores.items)} items here, got n={n}")
    kept = np.zeros(len(scores.items), dtype=bool)
    kept[ranking(scores, order)[:n]] = True
    return Circuit(scores.items, kept)


def above(scores: ItemScores, threshold: float, order: Order = "absolute") -> Circuit:
    """Items of at least this score (`signed`) or |score| (`absolute`).

    Raises:
        RelevanceError: there are none.
    """
    values = scores.values(order)
    kept = values >= threshold
    if not kept.any():
        raise RelevanceError(f"threshold {threshold:g} leaves an empty circuit; the best score is {values.max():.3g}")
    return Circuit(scores.items, kept)


def frequent(scores: ItemScores, n: int, frequency: float = 0.9) -> Circuit:
    """Items that are among the n strongest, by |score|, in at least this share of bootstrap resamples of the examples.

    In place of one cut through one order (CIRCUS, arXiv 2603.00523, counts agreement over cuts; only its abstract was at hand): what would
    be left out on other examples is left out here.

    Raises:
        RelevanceError: the scores of single examples are not known, or no item is as frequent.
    """
    if not 1 <= n <= len(scores.items):
        raise RelevanceError(f"a circuit has 1 to {len(scores.items)} items here, got n={n}")
    if not 0 < frequency <= 1:
        raise RelevanceError(f"frequency is a share of the resamples, above 0 and up to 1, not {frequency:g}")
    kept = scores.stability(n).frequency >= frequency
    if not kept.any():
        raise RelevanceError(f"no item is among the {n} strongest in {frequency:.0%} of resamples; take a lower frequency or more pairs")
    return Circuit(scores.items, kept)


def greedy(scores: ItemScores, n: int, order: Order = "absolute") -> Circuit:
    """Up to n edges, the best one at a time among those that enter what is in the circuit already, from the logits down (as in EAP).

    Source: the search of EAP (Syed et al. 2023, arXiv 2310.10348).

    Raises:
        RelevanceError: items are nodes, which have no edges to follow, or n is not among 1 and the number of items.
    """
    items = scores.items
    if items.level != "edge":
        raise RelevanceError("greedy choice follows edges from the logits; nodes have none, use top")
    if not 1 <= n <= len(items):
        raise RelevanceError(f"a circuit has 1 to {len(items)} items here, got n={n}")
    # Within a head information moves between positions, so a component is reached at all of them at once.
    entering: defaultdict[str, list[int]] = defaultdict(list)
    for index, reader in enumerate(items.frame["target"]):
        entering[owner(reader)].append(index)
    values = scores.values(order)
    kept, reached = np.zeros(len(items), dtype=bool), {LOGITS}
    heap = [(-values[i], i) for i in entering[LOGITS]]
    heapq.heapify(heap)
    writers = items.frame["source"].to_numpy()
    while heap and kept.sum() < n:
        _, index = heapq.heappop(heap)
        kept[index] = True
        if writers[index] not in reached:
            reached.add(writers[index])
            for i in entering[writers[index]]:
                heapq.heappush(heap, (-values[i], i))
    return Circuit(items, kept)
