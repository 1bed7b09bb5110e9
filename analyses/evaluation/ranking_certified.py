"""A ranking of a data set with its first places certified by patching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Component, Direction, Node
from analyses.datasets.streaming import PairStream
from analyses.evaluation.certification import Certificate, settle
from analyses.evaluation.patched_effects import effects_of_nodes


def certified(
    model: TransformerBridge, stream: PairStream, kind: Component, *, ranking: pd.DataFrame, k: int, direction: Direction
) -> pd.DataFrame:
    """The ranking with what was patched in the place of its estimate, and a column source.

    Args:
        ranking: as of `RankingSums.frame`, with low and high.
    """
    nodes = [
        Node(kind.name, int(layer), **{kind.index: int(index)}) for layer, index in zip(ranking["layer"], ranking[kind.index], strict=True)
    ]

    def patch(chosen: Sequence[int]) -> np.ndarray:
        return effects_of_nodes(model, stream, [nodes[i] for i in chosen], direction)

    low, high, score = (ranking[name].to_numpy(float) for name in ("low", "high", "score"))
    effects, rounds = settle(low, high, score, k, patch)
    ranking = ranking.assign(source="estimated")
    for i, effect in effects.items():
        # One pair has no spread, and so no standard error.
        error = float(effect.std(ddof=1) / len(effect) ** 0.5) if len(effect) > 1 else float("nan")
        mean = float(effect.mean())
        row: dict[str, Any] = {"score": mean, "standard_error": error, "low": mean, "high": mean, "reliable": True, "source": "patched"}
        for name, value in row.items():
            ranking.at[i, name] = value
    ranking.attrs["certificate"] = Certificate(k, direction, len(effects), len(nodes), rounds)
    return ranking
