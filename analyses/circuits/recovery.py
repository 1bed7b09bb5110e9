"""A circuit, or scores, against a circuit that is known."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from analyses.circuits.choose import Circuit
from analyses.circuits.items import Items
from analyses.circuits.scores import ItemScores
from analyses.components import Node
from lens_relevance.errors import RelevanceError

Key = str | Node | tuple[str | Node, ...]


@dataclass(frozen=True)
class Overlap:
    """How far a circuit and a known one agree.

    Attributes:
        precision: share of the circuit that is known.
        recall: share of the known that is in the circuit.
    """

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean of the two."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def known_circuit(items: Items, known: Collection[Key]) -> Circuit:
    """The circuit of nodes (`"L0H1"`) or edges (`("embed", "L0H1.q")`), at all positions.

    Raises:
        RelevanceError: an empty circuit, or a name that is no item.
    """
    if not known:
        raise RelevanceError("the known circuit is empty")
    columns = ["node"] if items.level == "node" else ["source", "target"]
    keys = [k[0] if len(columns) == 1 else k for k in zip(*(items.frame[c] for c in columns), strict=True)]
    wanted = {str(k) if isinstance(k, str | Node) else tuple(map(str, k)) for k in known}
    unknown = wanted - set(keys)
    if unknown:
        raise RelevanceError(f"{sorted(map(str, unknown))[0]} is no {items.level} of this model")
    return Circuit(items, np.array([k in wanted for k in keys]))


def overlap(circuit: Circuit, known: Circuit) -> Overlap:
    """Precision and recall of a circuit.

    Raises:
        RelevanceError: the circuits choose among different items, or one is empty.
    """
    if len(circuit.kept) != len(known.kept):
        raise RelevanceError(f"the circuits choose among {len(circuit.kept)} and {len(known.kept)} items")
    if len(circuit) == 0 or len(known) == 0:
        raise RelevanceError("an empty circuit has no precision or recall")
    both = int((circuit.kept & known.kept).sum())
    return Overlap(both / len(circuit), both / len(known))


def auroc(scores: ItemScores, known: Circuit) -> float:
    """Chance that an item of the known circuit scores higher (by `strength`) than one outside it; ties count half."""
    return float(area_under_roc(scores.strength, known.kept))


def area_under_roc(values: Float[np.ndarray, "*row item"], positive: Bool[np.ndarray, " item"]) -> Float[np.ndarray, "*row"]:
    """The Mann-Whitney statistic over the number of pairs, row by row; ties count as halves."""
    n, m = int(positive.sum()), int((~positive).sum())
    if n == 0 or m == 0:
        raise RelevanceError("AUROC needs items inside and outside the known circuit")
    return np.asarray((rankdata(values, axis=-1)[..., positive].sum(-1) - n * (n + 1) / 2) / (n * m))
