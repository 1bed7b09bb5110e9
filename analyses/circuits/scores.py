"""Scores of all items by one method, from which circuits are chosen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analyses.circuits.ablation import Ablation
from analyses.circuits.integrated import integrated_edges
from analyses.circuits.items import Items
from analyses.datasets.batches import rows_together
from analyses.edges.attribution import EdgeAttribution, attribute_edges
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import as_target
from lens_relevance.ruleset_tables import Table, ruleset_name

Run = Literal["corrupt", "clean", "mean"]
Order = Literal["signed", "absolute"]
EAP_IG, RANDOM, PATCHING = "eap_ig", "random", "patching"
_BATCH = 8


@dataclass(frozen=True, eq=False)
class ItemScores:
    """One score per item, in the order of `items.frame`.

    signed: mean over examples of the estimate of what the item adds to the target. strength: mean over examples of its absolute value.
    downwards: whether the full circuit's metric is lower than the empty one's, so that a negative score carries it towards the full one.
    """

    items: Items
    method: str
    signed: np.ndarray
    strength: np.ndarray
    downwards: bool = False

    def __post_init__(self) -> None:
        for scores in (self.signed, self.strength):
            if len(scores) != len(self.items):
                raise RelevanceError(f"{len(scores)} scores for {len(self.items)} items")
            if not np.isfinite(scores).all():
                bad = int(np.flatnonzero(~np.isfinite(scores))[0])
                raise RelevanceError(
                    f"the scores of {self.method} hold {int((~np.isfinite(scores)).sum())} NaN or infinite values, the first at "
                    f"{self.items.frame.iloc[bad].to_dict()}; circuits cannot be ordered by them"
                )

    def values(self, order: Order) -> np.ndarray:
        """What items are ordered by: `signed`, the score towards the full circuit's metric; `absolute`, |score|."""
        if order not in ("signed", "absolute"):
            raise RelevanceError(f"order is 'signed' or 'absolute', got {order!r}")
        return np.abs(self.signed) if order == "absolute" else -self.signed if self.downwards else self.signed

    def to_frame(self) -> pd.DataFrame:
        """The items with columns score and strength, strongest first."""
        frame = self.items.frame.assign(score=self.signed, strength=self.strength)
        return frame.sort_values("score", key=lambda s: -s.abs(), kind="stable", ignore_index=True)


def score_items(
    ablation: Ablation, method: str | Table = "deeplift", run: Run = "corrupt", ig_steps: int = 20, seed: int = 0
) -> ItemScores:
    """Scores of the items of an `Ablation` on its pairs.

    method: a ruleset (`gradient` is attribution patching, EAP at edge level), estimate (u_clean - u_corrupt) . g_v; `eap_ig`: the same with
        g averaged over `ig_steps` midpoints of the line between corrupt and clean embeddings (Hanna et al. 2024, EAP-IG-inputs);
        `patching` (nodes only): activation patching, the mean of what setting the node alone to its clean value adds to the corrupt run
        (denoising) and what setting it alone to its replacement takes from the clean run (noising; the only one where means replace);
        `random`: normal numbers from `seed`.
    run: where g is taken: on the corrupt run (as TransformerLens does), on the clean one, or the mean of both. Only local rules tell the
        two apart; `deeplift`, which is symmetric, does not.
    """
    items, downwards = ablation.items, bool(ablation.full.mean() < ablation.empty.mean())
    if method == RANDOM:
        drawn = np.random.default_rng(seed).standard_normal(len(items))
        return ItemScores(items, RANDOM, drawn, np.abs(drawn))
    if method == PATCHING:
        per_example = _patching(ablation)
    else:
        per_example = torch.cat([_estimate(ablation, edges) for edges in _attributions(ablation, method, run, ig_steps)])
    values = per_example.double().cpu().numpy()
    name = method if isinstance(method, str) else ruleset_name(method)
    return ItemScores(items, name, values.mean(0), np.abs(values).mean(0), downwards)


def _attributions(ablation: Ablation, method: str | Table, run: Run, ig_steps: int) -> Any:
    """Edges of clean less corrupt, batch by batch."""
    if run not in ("corrupt", "clean", "mean"):
        raise RelevanceError(f"run is 'corrupt', 'clean' or 'mean', got {run!r}")
    model, everything = ablation.model, ablation.pairs
    for pairs in everything.batches(rows_together(model, as_target(everything.target), everything.clean, everything.clean_mask, _BATCH)):
        if method == EAP_IG:
            yield [(1.0, integrated_edges(model, pairs, ig_steps))]
            continue
        both = []
        mask = pairs.clean_mask
        if run != "clean":
            both.append((-1.0, attribute_edges(model, pairs.corrupt, pairs.target, method, pairs.clean, mask)))
        if run != "corrupt":
            both.append((1.0, attribute_edges(model, pairs.clean, pairs.target, method, pairs.corrupt, mask)))
        yield [(sign / len(both), edges) for sign, edges in both]


def _estimate(ablation: Ablation, parts: list[tuple[float, EdgeAttribution]]) -> Tensor:
    """[example, item]"""
    items, total = ablation.items, None
    for sign, edges in parts:
        scores = edges.writer_scores if items.level == "node" else edges.scores
        mine = sign * items.gather(scores, edges.writers)
        total = mine if total is None else total + mine
    assert total is not None
    return total


def _patching(ablation: Ablation) -> Tensor:
    """[example, item]: the mean of denoising and noising, each item on its own."""
    if ablation.items.level != "node":
        raise RelevanceError("patching every edge on its own takes a forward per edge; score edges by a ruleset or eap_ig")
    alone = ~torch.eye(len(ablation.items), dtype=torch.bool)
    noising = ablation.full - ablation(alone)
    if ablation.mean_tokens is not None:  # there is no run that nodes could be denoised in
        return noising.T
    pairs = ablation.pairs
    swapped = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean, clean_mask=pairs.corrupt_mask, corrupt_mask=pairs.clean_mask)
    corrupt = Ablation(ablation.model, swapped, "node", ablation.items.pos > 1, bytes_at_once=ablation.bytes_at_once)
    denoising = corrupt(alone) - corrupt.full
    return (denoising + noising).T / 2
