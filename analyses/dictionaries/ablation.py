"""The yardstick of feature scores: single features set to their values in the other run, in the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Direction, resolve_direction
from analyses.datasets.progress import progress_bar
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import Dictionary, RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.hooks.read_positions import ReadPositions, reading_at
from lens_relevance.logit_reading import without_logits
from lens_relevance.sites import anatomy

_TOKENS_PER_PASS = 1024
FeatureOfDictionary = tuple[int, int]
"""Index of a dictionary, and of a feature in it."""


@torch.no_grad()
@left_as_found
def ablate_features(
    model: TransformerBridge,
    pairs: PromptPairs,
    dictionaries: Sequence[Dictionary],
    *,
    features: Sequence[FeatureOfDictionary],
    direction: Direction = "mean",
) -> Float[Tensor, "feature pair"]:
    """What setting one feature at all positions to its value in the other run does to the target.

    What passes the HookPoint is moved along the feature's decoder row by the difference of its values; other features and the error stay.
    Noising: m(clean) - m(clean run with the feature as in the corrupt run). Denoising: m(corrupt run with the feature as in the clean run)
    - m(corrupt). Both are positive where the feature carries what makes the target larger.

    Args:
        features: Index of a dictionary and of one of its features, for each feature to set.
        direction: noising, denoising, or the mean of both effects.

    Raises:
        RelevanceError: A dictionary of a cross-layer transcoder, a feature out of range, or no such direction.
    """
    pairs, names = require_pairs(pairs), anatomy(model)
    resolve_direction(direction)
    for index, feature in features:
        if not (0 <= index < len(dictionaries) and 0 <= feature < dictionaries[index].n_features):
            raise RelevanceError(f"feature {feature} of dictionary {index} is out of range")
        if len(dictionaries[index].point_out) > 1:
            raise RelevanceError("features that write to several HookPoints are not ablated one by one")
    points = [(names.canonical(one.point_in), names.canonical(one.point_out[0])) for one in dictionaries]
    values = [feature_values(model, pairs, run, dictionaries, points) for run in ("clean", "corrupt")]
    ways = ["noising", "denoising"] if direction == "mean" else [direction]
    n_per_pass = max(1, _TOKENS_PER_PASS // pairs.clean.numel())
    effects = torch.zeros(len(features), len(pairs), dtype=torch.float64)
    with progress_bar() as bar:
        task = bar.add_task("ablating features", total=len(ways) * len(features))
        for way in ways:
            own, other = values if way == "noising" else values[::-1]
            run = "clean" if way == "noising" else "corrupt"
            base = _metric(model, pairs, run, 1, [])
            for start in range(0, len(features), n_per_pass):
                chosen = features[start : start + n_per_pass]
                edits = []
                for row, (index, feature) in enumerate(chosen):
                    change = (other[index][..., feature] - own[index][..., feature]).unsqueeze(-1)
                    decoder = dictionaries[index].decoder[0][feature].to(change)
                    edits.append((points[index][1], slice(row * len(pairs), (row + 1) * len(pairs)), change * decoder))
                moved = _metric(model, pairs, run, len(chosen), edits).reshape(len(chosen), len(pairs))
                effect = base - moved if way == "noising" else moved - base
                effects[start : start + len(chosen)] += effect.cpu().double() / len(ways)
                bar.advance(task, len(chosen))
    return effects


def feature_values(
    model: TransformerBridge, pairs: PromptPairs, run: str, dictionaries: Sequence[Dictionary], points: Sequence[tuple[str, str]]
) -> list[Float[Tensor, "pair pos feature"]]:
    """The features' values in a run, as they are written."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda x, hook: found.update({name: x.detach()})

    with model.hooks(fwd_hooks=[(name, keep(name)) for name in dict.fromkeys(reads for reads, _ in points)]):
        tokens = getattr(pairs, run)
        with without_logits(model, tokens):
            model(tokens, attention_mask=_mask(pairs), return_type=None)
    values = []
    for dictionary, (reads, _) in zip(dictionaries, points, strict=True):
        x = found[reads].float() if found[reads].dtype != torch.float64 else found[reads]
        x = x.flatten(2)
        values.append(dictionary.to(x).written(x))
    return values


def _metric(
    model: TransformerBridge, pairs: PromptPairs, run: str, times: int, edits: Sequence[tuple[str, slice, Tensor]]
) -> Float[Tensor, " row"]:
    """The target of the pairs, repeated so many times, with rows of some HookPoints moved."""
    repeated = pairs[torch.arange(len(pairs)).repeat(times)]
    tokens, metric = getattr(repeated, run), repeated.metric(model, run)  # type: ignore[arg-type]

    def move(rows: slice, change: Tensor) -> Any:
        def hook(y: Tensor, hook: Any) -> Tensor:
            y = y.clone()
            y[rows] += change.reshape(y[rows].shape).to(y)
            return y

        return hook

    reading = None if metric.at is None else ReadPositions(metric.at, tokens.shape[1])
    hooks = [(name, move(rows, change)) for name, rows, change in edits]
    with reading_at(model, reading), model.hooks(fwd_hooks=hooks):
        logits = model(tokens, attention_mask=_mask(repeated))
    values = metric.of_read()(logits) if reading is not None and reading.taken else metric(logits)
    return values.expand(len(tokens))


def _mask(pairs: PromptPairs) -> Tensor | None:
    mask = pairs.clean_mask
    return None if mask is None or bool((mask == 1).all()) else mask
