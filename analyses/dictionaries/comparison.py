"""Which method can be trusted on features: estimates held against the ablation of single features, on the same pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import FEATURES
from analyses.dictionaries.ablation import FeatureOfDictionary, ablate_features, feature_values
from analyses.evaluation.agreement import agreement, intervals
from analyses.methods.integrated_path import embeddings_moved, embeddings_of, midpoints
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import Dictionary, RelevanceError, propagate, rulesets
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.sites import anatomy

METHODS = ("deeplift", "gradient", "relp", "integrated_gradients")
_STEPS = 10


@left_as_found
def compare_features(
    model: TransformerBridge,
    pairs: PromptPairs,
    dictionaries: Sequence[Dictionary],
    *,
    n_features: int = 200,
    methods: Sequence[str] = METHODS,
    resamples: int = 200,
) -> pd.DataFrame:
    """How well estimates of features agree with ablating each feature (the mean of both directions).

    The features are the n whose values change most between the two runs of the pairs, as they write it (|change| x norm of the decoder
    row), whatever any method says of them; of each dictionary equally many.

    Args:
        methods: Rulesets, and "integrated_gradients" (10 steps along the line between the embeddings of the two runs). Coefficients of
            rulesets that do not compare two runs are taken on both and averaged, as the yardstick is.
        resamples: Bootstrap resamples of the pairs for the 95 % intervals.

    Returns:
        A row per method and HookPoint, and one of all of them: method, point ("all"), pearson, spearman, sign_agreement, top_k_overlap
        (k = 20), magnitude_error over features, of scores averaged over pairs; pearson_low to spearman_high; features, pairs, seconds.
    """
    pairs = require_pairs(pairs)
    chosen = most_changed(model, pairs, dictionaries, n_features)
    effects = ablate_features(model, pairs, dictionaries, features=chosen).numpy()
    at = np.array([index for index, _ in chosen])
    rows = []
    for method in methods:
        start = time.perf_counter()
        scores = estimates(model, pairs, dictionaries, method)
        seconds = time.perf_counter() - start
        estimate = np.stack([scores[index][:, feature].double().cpu().numpy() for index, feature in chosen])
        for index, point in ((None, "all"), *enumerate(one.point_out[0] for one in dictionaries)):
            here = slice(None) if index is None else at == index
            found = vars(agreement(estimate[here].mean(1), effects[here].mean(1), 20))
            for name, (low, high) in intervals(estimate[here], effects[here], resamples).items():
                found |= {f"{name}_low": low, f"{name}_high": high}
            rows.append({"method": method, "point": point, **found, "features": len(estimate[here]), "seconds": seconds})
    return pd.DataFrame(rows).assign(pairs=len(pairs))


def compare_on_features(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Sequence[object],
    *,
    dictionaries: Sequence[Dictionary],
    n_features: int,
    resamples: int,
) -> pd.DataFrame:
    """The rows of `compare_features` for all HookPoints together, by those of the methods that are rulesets, best first.

    Raises:
        RelevanceError: no dictionaries, or none of the methods is a ruleset.
    """
    known = [name for name in methods if isinstance(name, str) and name in rulesets()]
    if not known or not dictionaries:
        raise RelevanceError("a comparison on features needs dictionaries=[...] and a ruleset among the methods")
    table = compare_features(model, pairs, dictionaries, n_features=n_features, methods=known, resamples=resamples)
    whole = table[table["point"] == "all"].drop(columns="point").sort_values("pearson", ascending=False, kind="stable", ignore_index=True)
    whole.insert(1, "component", FEATURES)
    return whole


def most_changed(model: TransformerBridge, pairs: PromptPairs, dictionaries: Sequence[Dictionary], n: int) -> list[FeatureOfDictionary]:
    """The features that write most of what differs between the two runs, equally many of each dictionary.

    Raises:
        RelevanceError: there are fewer that differ.
    """
    points = points_of(model, dictionaries)
    with torch.no_grad():
        clean, corrupt = (feature_values(model, pairs, run, dictionaries, points) for run in ("clean", "corrupt"))
    chosen: list[FeatureOfDictionary] = []
    for index, dictionary in enumerate(dictionaries):
        size = (clean[index] - corrupt[index]).abs().sum((0, 1)) * dictionary.decoder[0].norm(dim=1).to(clean[index])
        share = n // len(dictionaries) + (index < n % len(dictionaries))
        if int((size > 0).sum()) < share:
            raise RelevanceError(
                f"{dictionary!r} has {int((size > 0).sum())} features that differ between the runs, and {share} are asked for"
            )
        chosen += [(index, feature) for feature in size.argsort(descending=True, stable=True)[:share].tolist()]
    return chosen


def points_of(model: TransformerBridge, dictionaries: Sequence[Dictionary]) -> list[tuple[str, str]]:
    names = anatomy(model)
    return [(names.canonical(one.point_in), names.canonical(one.point_out[0])) for one in dictionaries]


def estimates(
    model: TransformerBridge, pairs: PromptPairs, dictionaries: Sequence[Dictionary], method: str
) -> list[Float[Tensor, "pair feature"]]:
    """Scores of all features of each dictionary, clean against corrupt, summed over positions."""
    points = points_of(model, dictionaries)
    outs = [out for _, out in points]
    with torch.no_grad():
        clean, corrupt = (feature_values(model, pairs, run, dictionaries, points) for run in ("clean", "corrupt"))
    coefficients = _coefficients(model, pairs, outs, method)
    found = []
    for i, dictionary in enumerate(dictionaries):
        g = coefficients(outs[i]).flatten(2)
        found.append(((clean[i] - corrupt[i]) * (g @ dictionary.decoder[0].to(g).T)).sum(1))
    return found


def _coefficients(model: TransformerBridge, pairs: PromptPairs, outs: list[str], method: str) -> Callable[[str], Tensor]:
    def on(run: str, other: str | None, rules: str) -> dict[str, Tensor]:
        reference = None if other is None else getattr(pairs, other)
        cache = propagate(
            model, getattr(pairs, run), pairs.target, rules=rules, names_filter=outs, reference=reference, attention_mask=pairs.clean_mask
        )
        return {name: cache.coefficients[name] for name in outs}

    if method == "integrated_gradients":
        leaf = embeddings_of(model)
        embeddings = [
            propagate(model, getattr(pairs, run), pairs.target, rules="gradient", names_filter=leaf).activations[leaf]
            for run in ("clean", "corrupt")
        ]
        parts = []
        for share in midpoints(_STEPS):
            with embeddings_moved(model, embeddings[0] - embeddings[1], share):
                parts.append(on("corrupt", None, "gradient"))
    elif method.startswith("deeplift"):
        parts = [on("corrupt", "clean", method)]
    else:
        parts = [on("corrupt", None, method), on("clean", None, method)]
    return lambda name: torch.stack([part[name] for part in parts]).mean(0)
