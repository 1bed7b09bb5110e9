"""How faithful the circuits of each method are, as one table; with a checkpoint it survives an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits.ablation import Ablation
from analyses.circuits.faithfulness import faithfulness_curve
from analyses.circuits.items import Level
from analyses.circuits.scores import PATCHING, RANDOM, ItemScores, Order, score_items
from analyses.datasets.checkpoint import Checkpoint
from analyses.datasets.fingerprint import fingerprint
from analyses.datasets.progress import progress_bar
from analyses.methods import Estimator, estimator
from analyses.tasks.pairs import PromptPairs, require_pairs
from lens_relevance.hooks.model_state import left_as_found

METHODS = ("deeplift", "deeplift_ln", "relp", "attnlrp", "cp_lrp", "gim", "gradient", "eap_ig", PATCHING, RANDOM)
_ORDERS: tuple[Order, ...] = ("absolute", "signed")
_RANDOM_SEEDS = 5
_FINGERPRINT = 8  # pairs whose logits tell a run from another

Tensors = dict[str, Tensor]
Remembered = Callable[[str, Callable[[], Tensors]], Tensors]


@left_as_found
def faithfulness_table(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Sequence[str | Estimator] = METHODS,
    *,
    level: Level = "edge",
    seed: int = 0,
    held_out: PromptPairs | None = None,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """CMD and CPR of each method (see `score_items`): columns method, order, cmd, cpr, best CMD first. Edges leave `patching` out.

    Args:
        pairs: on which circuits are found, and evaluated unless there are held-out pairs.
        methods: names or Estimators (see `score_items`); `random` is the mean over five seeds.
        level: what circuits are made of, "node" or "edge".
        seed: of the first random order.
        held_out: pairs that circuits are evaluated on. cmd and cpr are then those on held-out pairs, and a further column, `selection_cmd`,
            is the CMD on `pairs`, by which rows are ordered: the first row is the method that one would have chosen, and its cmd what it is
            worth.
        checkpoint: a folder; an interrupted run that is started again with the same arguments goes on from there. The scores of each method
            and the areas of each curve are saved as soon as they are known.

    Raises:
        RelevanceError: an unknown method, or the checkpoint is one of another run.
    """
    pairs = require_pairs(pairs)
    tried = [m if m in (RANDOM, PATCHING) else estimator(m) for m in methods if (m, level) != (PATCHING, "edge")]
    names = [m if isinstance(m, str) else m.name for m in tried]
    remembered: Remembered = _computed
    if checkpoint is not None:
        sets = {"pairs": pairs} if held_out is None else {"pairs": pairs, "held-out pairs": held_out}
        run = fingerprint(model, sets, _FINGERPRINT, analysis="circuit", methods=names, level=level, seed=seed)
        remembered = Checkpoint(checkpoint, run).remembered
    found_on = Ablation(model, pairs, level)
    evaluated_on = found_on if held_out is None else Ablation(model, held_out, level)
    rows: list[dict[str, str | float]] = []
    with progress_bar() as bar:
        for number, method in enumerate(bar.track(tried, description="circuits")):
            prefixes = [f"{number}-{i}" for i in range(_RANDOM_SEEDS if method == RANDOM else 1)]
            scored = {p: _scores(remembered, p, found_on, method=method, seed=seed + i) for i, p in enumerate(prefixes)}
            for order in _ORDERS:
                cmd, cpr = _mean_areas(remembered, "evaluated", evaluated_on, scored=scored, order=order)
                row: dict[str, str | float] = {"method": names[number], "order": order, "cmd": cmd, "cpr": cpr}
                if held_out is not None:
                    row["selection_cmd"], _ = _mean_areas(remembered, "selection", found_on, scored=scored, order=order)
                rows.append(row)
    columns = ["method", "order", "cmd", "cpr"] + ([] if held_out is None else ["selection_cmd"])
    return pd.DataFrame(rows, columns=columns).sort_values(columns[-1] if held_out is not None else "cmd", kind="stable", ignore_index=True)


def _computed(name: str, compute: Callable[[], Tensors]) -> Tensors:
    """Without a checkpoint nothing is remembered."""
    return compute()


def _scores(remembered: Remembered, prefix: str, ablation: Ablation, *, method: str | Estimator, seed: int) -> ItemScores:
    def compute() -> Tensors:
        scores = score_items(ablation, method, seed=seed)
        numbers = {"signed": torch.from_numpy(scores.signed), "strength": torch.from_numpy(scores.strength)}
        return numbers | {"downwards": torch.tensor(scores.downwards)}

    known = remembered(f"scores-{prefix}", compute)
    name = method if isinstance(method, str) else method.name
    return ItemScores(ablation.items, name, known["signed"].numpy(), known["strength"].numpy(), bool(known["downwards"]))


def _mean_areas(
    remembered: Remembered, where: str, ablation: Ablation, *, scored: dict[str, ItemScores], order: Order
) -> tuple[float, float]:
    """CMD and CPR, means over the seeds."""

    def compute(scores: ItemScores) -> Tensors:
        curve = faithfulness_curve(ablation, scores, order)
        return {"areas": torch.tensor([curve.cmd, curve.cpr], dtype=torch.float64)}

    known = [remembered(f"{where}-{order}-{prefix}", lambda s=scores: compute(s))["areas"].numpy() for prefix, scores in scored.items()]  # type: ignore[misc]
    cmd, cpr = np.mean(known, axis=0)
    return float(cmd), float(cpr)
