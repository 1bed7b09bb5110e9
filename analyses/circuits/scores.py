"""Scores of all items by one method, from which circuits are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.circuits.ablation import Ablation
from analyses.circuits.items import Items
from analyses.components import Run, parse_node
from analyses.datasets.batches import rows_together
from analyses.evaluation.stability import Stability, stability
from analyses.methods import Estimator, estimator
from analyses.methods.base import turned
from analyses.tasks import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import as_target
from lens_relevance.ruleset_tables import Table

Order = Literal["signed", "absolute"]
RANDOM, PATCHING = "random", "patching"
_BATCH = 8


@dataclass(frozen=True, eq=False)
class ItemScores:
    """One score per item, in the order of `items.frame`.

    Attributes:
        items: what is scored.
        method: its name.
        signed: mean over examples of the estimate of what the item adds to the target.
        strength: mean over examples of the absolute value of that estimate.
        downwards: whether the full circuit's metric is lower than the empty one's, so that a negative score leads towards the full one.
        by_pair: the estimates of each example, [example, item]; None where they are not known (`random`, scores read from a file).
    """

    items: Items
    method: str
    signed: np.ndarray
    strength: np.ndarray
    downwards: bool = False
    by_pair: np.ndarray | None = None

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
        """What items are ordered by: `signed`, the score towards the full circuit's metric; `absolute`, |score|.

        Raises:
            RelevanceError: no such order.
        """
        if order not in ("signed", "absolute"):
            raise RelevanceError(f"order is 'signed' or 'absolute', got {order!r}")
        return np.abs(self.signed) if order == "absolute" else -self.signed if self.downwards else self.signed

    def stability(self, n: int) -> Stability:
        """What resampling of the examples does to the n strongest items (see `analyses.evaluation.stability`).

        Raises:
            RelevanceError: the scores of single examples are not known.
        """
        if self.by_pair is None:
            raise RelevanceError(f"the scores of {self.method} are known as means alone, so they cannot be resampled: use score_items")
        return stability(self.by_pair.T, n)

    def to_frame(self) -> pd.DataFrame:
        """The items with columns score and strength, strongest first."""
        frame = self.items.frame.assign(score=self.signed, strength=self.strength)
        return frame.sort_values("score", key=lambda s: -s.abs(), kind="stable", ignore_index=True)


def score_items(ablation: Ablation, method: str | Table | Estimator = "deeplift", run: Run = "corrupt", *, seed: int = 0) -> ItemScores:
    """Scores of the items of an `Ablation` on its pairs.

    Args:
        method: a method of `analyses.methods`, by name or as an Estimator, or a table of rules: estimates (u_clean - u_corrupt) . g_v.
            Edges take one that scores edges (rulesets, `eap_ig`, `conductance`); nodes also one that scores the residual stream, MLPs and
            heads.
            `patching` (nodes only): activation patching, the mean of what setting the node alone to its clean value adds to the corrupt run
            (denoising) and what setting it alone to its replacement takes from the clean run (noising; the only one where means replace).
            `random`: normal numbers from `seed`.
        run: where g is taken: on the corrupt run (as TransformerLens does), on the clean one, or the mean of both. Only local rules tell
            the two apart; `deeplift`, which is symmetric, does not.

    Raises:
        RelevanceError: an unknown method, or one that does not score what the items are.
    """
    items, downwards = ablation.items, bool(ablation.full.mean() < ablation.empty.mean())
    if method == RANDOM:
        return random_scores(items, seed)
    if method == PATCHING:
        name, per_example = PATCHING, _patching(ablation)
    else:
        chosen = estimator(method)
        name, per_example = chosen.name, _estimates(ablation, chosen, run)
    values = per_example.double().cpu().numpy()
    return ItemScores(items, name, values.mean(0), np.abs(values).mean(0), downwards, values)


def random_scores(items: Items, seed: int) -> ItemScores:
    """Normal numbers, whatever the model does."""
    drawn = np.random.default_rng(seed).standard_normal(len(items))
    return ItemScores(items, RANDOM, drawn, np.abs(drawn))


def _estimates(ablation: Ablation, method: Estimator, run: Run) -> Float[Tensor, "example item"]:
    """What a method gives each item on each pair, batch by batch."""
    items, of_nodes = ablation.items, {"resid", "heads", "mlp"} <= set(method.components)
    if method.edges is None and (items.level == "edge" or items.pos > 1 or not of_nodes):
        scored = f"it scores {', '.join(method.components)}" + (", at all positions together" if of_nodes and items.level == "node" else "")
        wanted = "edges" if items.level == "edge" else "the embeddings, every head and every MLP" + (" by position" * (items.pos > 1))
        raise RelevanceError(
            f"{method.name} cannot order these items, which are {wanted}: {scored}; choose a ruleset, eap_ig or conductance"
        )
    everything, batches = ablation.pairs, []
    size = rows_together(ablation.model, as_target(everything.target), everything.clean, mask=everything.clean_mask, size=_BATCH)
    for batch in everything.batches(size):
        parts = [weight * _one_run(ablation, method, pairs) for weight, pairs in method.parts(batch, run)]
        batches.append(torch.stack(parts).sum(0) if len(parts) > 1 else parts[0])
    return torch.cat(batches)


def _one_run(ablation: Ablation, method: Estimator, pairs: PromptPairs) -> Float[Tensor, "example item"]:
    """What a method gives each item with coefficients taken on the corrupt run."""
    items, model = ablation.items, ablation.model
    if method.edges is not None:
        edges = method.edges(model, pairs)
        return items.gather(edges.writer_scores if items.level == "node" else edges.scores, edges.writers)
    nodes = [parse_node(name) for name in items.frame["node"]]
    kinds = ["resid" if node.component == "embed" else node.component for node in nodes]
    scores = method.one_run(model, pairs, list(dict.fromkeys(kinds)))
    columns = []
    for node, kind in zip(nodes, kinds, strict=True):
        of_layer = scores[kind][:, max(node.layer, 0)]  # what the embeddings write is the residual stream that enters the first block
        columns.append(of_layer.sum(1) if node.head is None else of_layer[:, node.head])
    return torch.stack(columns, 1)


def _patching(ablation: Ablation) -> Tensor:
    """[example, item]: the mean of denoising and noising, each item on its own."""
    if ablation.items.level != "node":
        raise RelevanceError("patching every edge on its own takes a forward per edge; score edges by a ruleset, eap_ig or conductance")
    alone = ~torch.eye(len(ablation.items), dtype=torch.bool)
    noising = ablation.full - ablation(alone)
    if ablation.mean_tokens is not None:  # there is no run that nodes could be denoised in
        return noising.T
    pairs = ablation.pairs
    corrupt = Ablation(ablation.model, turned(pairs), "node", by_position=ablation.items.pos > 1, bytes_at_once=ablation.bytes_at_once)
    denoising = corrupt(alone) - corrupt.full
    return (denoising + noising).T / 2
