"""Does an explanation depend on what the model has learnt? Its scores on models whose weights are random (Adebayo et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.streaming import PairStream
from analyses.evaluation.agreement import mean_with_interval, rank_correlation
from analyses.evaluation.randomised_weights import EMBEDDINGS, OUTPUT, Parts, randomised_weights, weight_parts
from analyses.perturbation.attributions import Attribution
from analyses.perturbation.removal import removable_tokens
from analyses.tasks import PromptPairs
from lens_relevance.inputs.targets import as_target

RANDOMISED_COLUMNS = ("method", "kind", "part", "spearman", "low", "high")
LAYERS = 3
"""Layers that are looked at, evenly spread, the first and the last among them; cascading makes those in between random too."""


def stages(parts: Parts) -> list[tuple[str, str, Parts]]:
    """(kind, part, what is random) of every model that is looked at: from the logits down, then each part below the first alone."""
    names = list(parts)
    layers = [name for name in names if name not in (OUTPUT, EMBEDDINGS)]
    seen = {layers[i] for i in np.linspace(0, len(layers) - 1, min(LAYERS, len(layers))).round().astype(int)} | {OUTPUT, EMBEDDINGS}
    seen = {name for name in seen if len(parts[name])}
    down = [("cascading", name, {n: parts[n] for n in names[: i + 1] if len(parts[n])}) for i, name in enumerate(names) if name in seen]
    alone = [("independent", name, {name: parts[name]}) for name in names if name in seen][1:]  # the first is alone above, too
    return [*down, *alone]


def randomised_relevance(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Mapping[str, Attribution],
    trained: Mapping[str, Float[Tensor, "n pos"]],
    *,
    seed: int = 0,
    batch_size: int = 8,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """Spearman's correlation, over the tokens of a prompt but the first, of scores with those on models whose weights are random.

    Args:
        trained: scores of the model as it is, by method.

    Returns:
        See `TokenEvaluation.randomised`.
    """
    stream = PairStream(model, pairs, batch_size, checkpoint=checkpoint, analysis="token relevance, random weights", seed=seed)
    seen = removable_tokens(pairs.clean_mask).numpy()
    rows = []
    for kind, part, random in stages(weight_parts(model)):
        with randomised_weights(random, seed=seed):
            for name, method in methods.items():

                def step(batch: PromptPairs, method: Attribution = method) -> dict[str, Tensor]:
                    return {"scores": method(model, batch.clean, as_target(batch.target), batch.clean_mask)}

                found, _ = stream.collect(f"{name} {kind} {part}", step, f"random weights, {kind} {part}")
                both = [np.where(seen, scores.double().numpy(), np.nan) for scores in (found["scores"], trained[name])]
                values = dict(zip(("spearman", "low", "high"), mean_with_interval(rank_correlation(*both)), strict=True))
                rows.append({"method": name, "kind": kind, "part": part} | values)
    return pd.DataFrame(rows, columns=list(RANDOMISED_COLUMNS))
