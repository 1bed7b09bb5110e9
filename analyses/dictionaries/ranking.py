"""Features ranked by their part in what a target says of clean against corrupt prompts."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import Dictionary, RelevanceError, propagate
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.ruleset_tables import Table
from lens_relevance.sites import anatomy
from lens_relevance.sites.base import block_of

COLUMNS = ("point", "layer", "feature", "score", "standard_error", "active_share")


@left_as_found
def rank_features(
    model: TransformerBridge,
    pairs: PromptPairs,
    dictionaries: Sequence[Dictionary],
    *,
    rules: str | Table = "deeplift",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Features of dictionaries by their relevance, largest magnitude first; those that are off in all runs are left out.

    The score is the estimate of what patching a feature at all positions does: relevance in the model as it is (`dictionary_path="model"`),
    between the corrupt run and the clean one.

    Args:
        rules: A ruleset's name or table; coefficients are taken on the corrupt run (for `deeplift` both runs give the same).
        batch_size: Pairs per pass.

    Returns:
        A row per feature: point (where its dictionary writes), layer, feature, score (mean over pairs, in the units of the target),
        standard_error, active_share (share of pairs in which it is on at a position, in one run at least).

    Raises:
        RelevanceError: No dictionaries or pairs, and what `propagate` raises.
    """
    pairs, names = require_pairs(pairs), anatomy(model)
    if not dictionaries or not len(pairs):
        raise RelevanceError("a ranking of features needs at least one dictionary and one pair")
    points = {names.canonical(one.point_out[0]): one for one in dictionaries}
    totals = {point: torch.zeros(3, one.n_features, dtype=torch.float64) for point, one in points.items()}
    for batch in pairs.batches(batch_size):
        cache = propagate(
            model,
            batch.corrupt,
            batch.target,
            rules=rules,
            reference=batch.clean,
            attention_mask=batch.corrupt_mask,
            dictionaries=dictionaries,
            dictionary_path="model",
        )
        for point, total in totals.items():
            relevance = cache.features(point)
            scores = -torch.sparse.sum(relevance, 1).to_dense().double().cpu()  # the clean run less the corrupt one, where g is taken
            row, _, feature = relevance.indices().cpu()
            on = torch.zeros(len(batch), total.shape[1], dtype=torch.bool)
            on[row, feature] = True
            total += torch.stack([scores.sum(0), scores.square().sum(0), on.sum(0)])
    return _frame(totals, len(pairs))


def _frame(totals: dict[str, torch.Tensor], n: int) -> pd.DataFrame:
    frames = []
    for point, total in totals.items():
        kept = (total[2] > 0).nonzero().flatten()
        mean = total[0] / n
        variance = (total[1] - n * mean.square()).clamp(min=0) / (n - 1) if n > 1 else torch.full_like(mean, torch.nan)
        layer = block_of(point)[1]
        frames.append(
            pd.DataFrame(
                {
                    "point": point,
                    "layer": -1 if layer is None else layer,
                    "feature": kept.tolist(),
                    "score": mean[kept].tolist(),
                    "standard_error": (variance / n).sqrt()[kept].tolist(),
                    "active_share": (total[2] / n)[kept].tolist(),
                }
            )
        )
    ranked = pd.concat(frames, ignore_index=True)
    return ranked.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)
