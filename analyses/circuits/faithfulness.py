"""How faithful circuits of growing size are: the faithfulness curve, CPR and CMD (MIB, Mueller et al. 2025).

f(k) = (m(C_k) - m(empty)) / (m(model) - m(empty)), m the mean of the metric over examples, C_k the best k items.
CPR: area under f over the share of items kept (higher is better; unbounded). CMD: area of |1 - f| (0 is best).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from analyses.circuits.choose import Circuit, ranking
from analyses.circuits.items import Items
from analyses.circuits.scores import ItemScores, Order
from lens_relevance.errors import RelevanceError

PERCENTAGES = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
EVERY_K_BELOW = 1_000


@runtime_checkable
class Evaluated(Protocol):
    """What circuits are evaluated on: an `Ablation`, or a `FeatureAblation` of `analyses.dictionaries`."""

    items: Items
    full: Float[Tensor, " example"]
    empty: Float[Tensor, " example"]

    def __call__(self, kept: Bool[Tensor, "circuit item"]) -> Float[Tensor, "circuit example"]:
        """The metric of each circuit on each pair."""


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of circuits of growing size.

    Attributes:
        frame: columns k, share (k over the number of items), metric (mean over examples), faithfulness.
        method, order: how items were ordered.
        cpr, cmd: the areas under f and under |1 - f|.
    """

    frame: pd.DataFrame
    method: str
    order: Order
    cpr: float
    cmd: float


def sizes(n_items: int) -> np.ndarray:
    """Circuit sizes k: every k from 0 under 1,000 items, else the percentages of MIB rounded down."""
    if n_items < EVERY_K_BELOW:
        return np.arange(n_items + 1)
    return np.array([int(p / 100 * n_items) for p in PERCENTAGES])


def areas(share: Float[np.ndarray, " k"], faithfulness: Float[np.ndarray, " k"]) -> tuple[float, float]:
    """CPR and CMD by the linear trapezoid rule."""
    return float(np.trapezoid(faithfulness, share)), float(np.trapezoid(np.abs(1 - faithfulness), share))


def faithfulness(ablation: Evaluated, circuits: Sequence[Circuit]) -> np.ndarray:
    """f of each circuit, [circuit].

    Raises:
        RelevanceError: the full and the empty circuit have the same metric, or a circuit is empty.
    """
    if not circuits:
        raise RelevanceError("there is no circuit to evaluate")
    if any(len(circuit) == 0 for circuit in circuits):
        raise RelevanceError("a circuit is empty: its faithfulness is 0 by definition")
    masks = torch.from_numpy(np.stack([circuit.kept for circuit in circuits]))
    return _recovered(ablation, ablation(masks).double().mean(1).cpu().numpy())


def faithfulness_curve(ablation: Evaluated, scores: ItemScores, order: Order = "absolute") -> FaithfulnessCurve:
    """f over circuits of growing size: every size under 1,000 items, else 0.1 to 100 %.

    Source: MIB (Mueller et al. 2025, arXiv 2504.13151).
    """
    counts = sizes(len(ablation.items))
    frame = faithfulness_frame(ablation, scores, order, counts=counts)
    cpr, cmd = areas(counts / len(ablation.items), frame["faithfulness"].to_numpy())
    return FaithfulnessCurve(frame, scores.method, order, cpr, cmd)


def faithfulness_frame(ablation: Evaluated, scores: ItemScores, order: Order, *, counts: Int[np.ndarray, " k"]) -> pd.DataFrame:
    """Columns k, share, metric, faithfulness of the circuits of the best k items, for these k; see `FaithfulnessCurve`."""
    n = len(ablation.items)
    if len(scores.items) != n:
        raise RelevanceError(f"scores of {len(scores.items)} items do not fit an ablation of {n}")
    rank = np.empty(n, dtype=int)
    rank[ranking(scores, order)] = np.arange(n)
    metric = ablation(torch.from_numpy(rank[None, :] < counts[:, None])).double().mean(1).cpu().numpy()
    return pd.DataFrame({"k": counts, "share": counts / n, "metric": metric, "faithfulness": _recovered(ablation, metric)})


def _recovered(ablation: Evaluated, metric: np.ndarray) -> np.ndarray:
    full, empty = float(ablation.full.double().mean()), float(ablation.empty.double().mean())
    rounding = 100 * torch.finfo(ablation.full.dtype).eps
    if not abs(full - empty) > rounding * max(abs(full), abs(empty)):
        raise RelevanceError(
            f"the metric is {full:.4g} with the full and {empty:.4g} with the empty circuit, so faithfulness is undefined; "
            "choose pairs that the model tells apart"
        )
    return (metric - empty) / (full - empty)
