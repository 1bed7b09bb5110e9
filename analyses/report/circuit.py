"""Are the strongest edges enough? Circuits of growing size, held against attribution patching and a random order."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import Ablation, faithfulness_curve, score_items
from analyses.datasets.progress import progress_bar
from analyses.tasks import PromptPairs

N_TRIED = 4  # every size of circuit is tried on each of them
_ENOUGH = 0.9


@dataclass(frozen=True)
class CircuitCheck:
    """How faithful the circuits of the k strongest edges are.

    Attributes:
        curves: columns method, k, share, metric, faithfulness; one row per method and size.
        areas: one row per method: method, cmd (0 is best), cpr (higher is better), edges_for_90 (the smallest k from which on
            faithfulness stays at 0.9 or above).
        n_edges: edges of the model.
        n_found, n_tried: pairs of prompts on which edges were ordered, and others on which the circuits were tried; n_found is 0 where
            there are too few pairs to keep them apart.
        sizes: how many sizes were tried.
    """

    curves: pd.DataFrame
    areas: pd.DataFrame
    n_edges: int
    n_found: int
    n_tried: int
    sizes: int

    def enough(self, method: str) -> int:
        """The smallest circuit of a method from which on at least 0.9 of the difference comes back."""
        return int(self.areas["edges_for_90"][self.areas["method"] == method].iloc[0])

    def largest_part(self, method: str) -> tuple[int, float]:
        """Of the circuits that are not the whole model the largest that was tried: its edges, and the share that it brings back."""
        curve = self.curves[(self.curves["method"] == method) & (self.curves["k"] < self.n_edges)].iloc[-1]
        return int(curve["k"]), float(curve["faithfulness"])


def check_circuits(model: TransformerBridge, pairs: PromptPairs, rules: str) -> CircuitCheck:
    """Order the model's edges by |relevance| under `rules`, by attribution patching (`gradient`) and at random; grow circuits from each.

    Circuits are tried on the first `N_TRIED` pairs and found on the others, or on the same ones where there are no others.

    Raises:
        RelevanceError: a model whose edges cannot be separated, or pairs that do not differ in the target.
    """
    ablation = Ablation(model, pairs[slice(0, N_TRIED)], "edge")
    n_found = max(len(pairs) - N_TRIED, 0)
    found_on = Ablation(model, pairs[slice(N_TRIED, None)], "edge") if n_found else ablation
    curves, areas = [], []
    with progress_bar() as bar:
        for method in bar.track(list(dict.fromkeys((rules, "gradient", "random"))), description="circuits"):
            curve = faithfulness_curve(ablation, score_items(found_on, method))
            curves.append(curve.frame.assign(method=method))
            areas.append({"method": method, "cmd": curve.cmd, "cpr": curve.cpr, "edges_for_90": smallest_faithful(curve.frame)})
    return CircuitCheck(
        pd.concat(curves, ignore_index=True), pd.DataFrame(areas), len(ablation.items), n_found, len(ablation.pairs), len(curves[0])
    )


def smallest_faithful(curve: pd.DataFrame) -> int:
    """The smallest k from which on faithfulness stays high: a curve that passes 0.9 on its way elsewhere has not arrived."""
    low = curve.index[curve["faithfulness"] < _ENOUGH]
    return int(curve["k"].iloc[low[-1] + 1]) if len(low) and low[-1] + 1 < len(curve) else int(curve["k"].iloc[-1 if len(low) else 0])
