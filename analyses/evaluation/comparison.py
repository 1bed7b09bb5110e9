"""Which method can be trusted: every estimate held against activation patching, on the same pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import FEATURES, Direction, Run, resolve_component, resolve_direction, resolve_run
from analyses.datasets.pass_size import pairs_per_pass
from analyses.datasets.streaming import PairStream
from analyses.evaluation.agreement import agreement, intervals, mean_over_pairs
from analyses.evaluation.patched_effects import effects_of_patching
from analyses.evaluation.reliability import Coverage, Reliability, coverage, reliability
from analyses.evaluation.stability import stability
from analyses.evaluation.yardstick import yardstick_table, yardstick_warnings
from analyses.methods import Estimator, estimator
from analyses.models.structure import n_layers
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import Dictionary, RelevanceError
from lens_relevance.hooks.model_state import left_as_found

METHODS = (
    *(
        "combined",
        "deeplift",
        "deeplift_ln",
        "relp",
        "attnlrp",
        "cp_lrp",
        "gim",
        "gradient",
        "eap_ig",
        "conductance",
        "direct_logit_attribution",
    ),
    *("weighted_accumulation", "chefer_2021b"),
)
COMPONENTS = ("resid", "attn", "mlp", "heads")
COLUMNS = (
    *("method", "component", "pearson", "spearman", "sign_agreement", "top_k_overlap", "magnitude_error", "completeness"),
    *("forwards", "backwards", "seconds", "pearson_low", "pearson_high", "spearman_low", "spearman_high", "jaccard"),
)
_COMPARED = ("resid", "attn", "mlp", "heads", "q", "k", "v")


@dataclass(frozen=True)
class Comparison:
    """Estimates and effects, and the table of their agreement.

    Attributes:
        table: as `compare_with_patching` returns it.
        scores: one row per component and index: component, layer, position or head (`index`), patching, and one column per method; averaged
            over pairs. Of the first method with intervals also low, high and reliable; top_frequency and q_value of the effects of patching
            over resamples of the pairs (see `evaluation.stability`).
        patching_seconds: what the yardstick cost.
        yardstick: what tells whether the yardstick can be trusted, per component (see `evaluation.yardstick`); doubts: the same in words.
        bracketed: the method that low and high belong to, and by component how often its intervals hold the effect of patching.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    patching_seconds: float
    n_pairs: int
    direction: str
    yardstick: pd.DataFrame
    doubts: tuple[str, ...]
    bracketed: tuple[str, dict[str, Coverage]] | None

    def __repr__(self) -> str:
        return f"Comparison({', '.join(self.table['component'].unique())}: {self.direction} of patching, {self.n_pairs} pairs)"

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, float_format="{:.3f}".format) + "".join(f"<p>{escape(doubt)}</p>" for doubt in self.doubts)

    def heads(self, column: str) -> np.ndarray:
        """A column of `scores` for the heads, [layer, head]."""
        rows = self.scores[self.scores["component"] == "heads"]
        return rows.pivot(index="layer", columns="index", values=column).to_numpy(float)


def compare_with_patching(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Sequence[str | Estimator] = METHODS,
    *,
    components: Sequence[str] = COMPONENTS,
    direction: Direction = "mean",
    run: Run = "corrupt",
    top_k: int | None = None,
    pooled: bool = False,
    resamples: int = 200,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    dictionaries: Sequence[Dictionary] = (),
    n_features: int = 200,
) -> pd.DataFrame:
    """How well each method agrees with activation patching: one row per method and component, best mean correlation first.

    Args:
        methods: names (`analyses.methods`) or Estimators.
        components: resid, attn and mlp by layer and position; heads, q, k and v by layer and head, all positions together. Or
            `["features"]`: features of dictionaries, all positions together, by the methods that are rulesets (see `compare_features`).
        direction: the yardstick: denoising, noising, or the mean of both.
        run: where the estimates take their coefficients.
        top_k: size of the sets that top_k_overlap compares; a tenth of the components, 3 at least, by default.
        pooled: correlate over components x pairs instead of over components of scores averaged over pairs.
        resamples: bootstrap resamples of the pairs for the 95 % intervals; 0 for none.
        batch_size: pairs per pass of the estimates; None for as many as fit.
        checkpoint: a folder; an interrupted run that is started again with the same arguments goes on from there (see `PairStream`).
        dictionaries, n_features: for features: whose they are, and how many are patched.

    Columns: method, component; pearson, spearman, sign_agreement, top_k_overlap, magnitude_error (see `evaluation.agreement`); completeness
    (the largest error at any layer of "the residual stream's scores add up to m(clean) - m(corrupt)", as a share of that); forwards and
    backwards (passes over each pair) and seconds of the method, the same for all its components; pearson_low to spearman_high; jaccard
    (what the top k found on two halves of the pairs have in common, see `evaluation.stability`).

    Under `accelerate launch` each process takes its share of the pairs, and all return the whole table.

    Raises:
        RelevanceError: unknown methods or components, two methods of one name, or no pairs.
    """
    if set(components) & {FEATURES, "feature"}:
        if len(components) > 1 or direction != "mean" or pooled or top_k is not None or checkpoint is not None:
            raise RelevanceError("features are compared by themselves (components=['features']), in the mean of both directions, at once")
        from analyses.dictionaries.comparison import compare_on_features  # which imports from this package

        return compare_on_features(model, pairs, methods, dictionaries=dictionaries, n_features=n_features, resamples=resamples)
    scored: dict[str, Any] = {"components": components, "direction": direction, "run": run, "top_k": top_k, "pooled": pooled}
    return compare(model, pairs, methods, **scored, resamples=resamples, batch_size=batch_size, checkpoint=checkpoint).table


@left_as_found
def compare(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Sequence[str | Estimator] = METHODS,
    *,
    components: Sequence[str] = COMPONENTS,
    direction: Direction = "mean",
    run: Run = "corrupt",
    top_k: int | None = None,
    pooled: bool = False,
    resamples: int = 200,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
) -> Comparison:
    """`compare_with_patching`, with the scores that its table was made from."""
    pairs = require_pairs(pairs)
    chosen = [estimator(method) for method in methods]
    components, run = list(dict.fromkeys(resolve_component(name).name for name in components)), resolve_run(run)
    resolve_direction(direction)
    if other := [name for name in components if name not in _COMPARED]:
        raise RelevanceError(f"methods are compared on {', '.join(_COMPARED)}, not {other[0]}")
    if not chosen or not components or not len(pairs):
        raise RelevanceError("a comparison needs at least one method, one component and one pair")
    named = [method.name for method in chosen]
    if twice := [name for name in named if named.count(name) > 1]:
        raise RelevanceError(f"two methods are called {twice[0]!r}, so the table could not tell them apart; give one another name")
    stream = PairStream(
        model,
        pairs,
        batch_size
        if batch_size is not None
        else pairs_per_pass(model, pairs, chosen, ["resid", *components], run=run, checkpoint=checkpoint),
        checkpoint=checkpoint,
        analysis="comparison",
        methods=named,
        components=components,
        direction=direction,
        run=run,
    )
    effects, by_direction, gaps, patching_seconds = effects_of_patching(model, stream, components, direction)
    gap, together = float(gaps.mean()), len(gaps) == 1 < len(pairs)
    rows: list[dict[str, Any]] = []
    columns: dict[tuple[str, str], np.ndarray] = {}
    bracketed: tuple[str, dict[str, Coverage]] | None = None
    intervals_of: dict[str, Reliability] = {}
    for number, method in enumerate(chosen):
        wanted = [name for name in dict.fromkeys(("resid", *components)) if name in method.components]
        scores_by_component, seconds = stream.collect(f"{number} {method.name}", _estimate(model, method, wanted, run), method.name)
        scores = {name: scores_by_component[name].permute(1, 2, 0).numpy() for name in wanted}  # [layer, index, pair]
        if together:
            scores = {name: values.sum(2, keepdims=True) for name, values in scores.items()}
        shared = {
            "completeness": _incompleteness(scores.get("resid"), gap),
            "forwards": (method.forwards + method.per_layer * n_layers(model)) * method.passes(run),
            "backwards": (method.backwards + method.per_layer * n_layers(model)) * method.passes(run),
            "seconds": seconds,
        }
        for name in [name for name in components if name in wanted]:
            estimate = scores[name].reshape(-1, scores[name].shape[2])
            rows.append({"method": method.name, "component": name, **_cell(estimate, effects[name], top_k, pooled, resamples), **shared})
            columns[method.name, name] = mean_over_pairs(estimate)
        if method.bracket is not None and bracketed is None:
            for name in [name for name in components if name in wanted]:
                around = [values.mean(0).flatten().numpy() for key, values in scores_by_component.items() if key.startswith(f"{name}: ")]
                intervals_of[name] = reliability(name, columns[method.name, name], np.stack(around))
            held = {
                name: coverage(found, columns[method.name, name], mean_over_pairs(effects[name])) for name, found in intervals_of.items()
            }
            bracketed = method.name, held
    table = pd.DataFrame(rows)[list(COLUMNS)]
    # A method that scores heads alone is not ranked among those that were tried on everything.
    full = table["method"].map(table["method"].value_counts()) == len(components)
    best = (
        table.assign(pearson=table["pearson"].where(full, table["pearson"] - 2))
        .groupby("method")["pearson"]
        .mean()
        .sort_values(ascending=False, kind="stable")
        .index
    )
    table["method"] = pd.Categorical(table["method"], categories=list(best), ordered=True)
    table = table.sort_values("method", kind="stable").astype({"method": str}).reset_index(drop=True)
    yardstick = yardstick_table(effects, by_direction, gap, n_layers=n_layers(model))
    error = float(gaps.std(ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else float("nan")
    all_scores = _scores(effects, columns, components, chosen, n_layers(model), intervals_of)
    doubts = tuple(yardstick_warnings(yardstick, gap, error))
    return Comparison(table, all_scores, patching_seconds, len(pairs), direction, yardstick, doubts, bracketed)


def _estimate(
    model: TransformerBridge, method: Estimator, components: Sequence[str], run: Run
) -> Callable[[PromptPairs], dict[str, torch.Tensor]]:
    """What a method says of a batch; of one with intervals also what these are made of, as `component: estimate`."""

    def step(batch: PromptPairs) -> dict[str, torch.Tensor]:
        if method.bracket is None or method.centre is None:
            return method(model, batch, components, run=run)
        estimates = method.bracket(model, batch, components)
        parts = {f"{name}: {estimate}": scores for estimate, found in estimates.items() for name, scores in found.items()}
        return method.centre(estimates) | parts

    return step


def _incompleteness(resid: np.ndarray | None, gap: float) -> float:
    """How far the residual stream's scores [layer, pos, pair] are from adding up to the gap, at the worst layer, as a share of the gap."""
    if resid is None or not gap:
        return float("nan")
    return float(np.abs(resid.sum(1).mean(1) - gap).max() / abs(gap))


def _cell(estimate: np.ndarray, effect: np.ndarray, top_k: int | None, pooled: bool, resamples: int) -> dict[str, float]:
    estimate = np.where(np.isnan(effect), np.nan, estimate)
    k = top_k or max(3, len(effect) // 10)
    if pooled:
        there = ~np.isnan(effect)
        measures = agreement(estimate[there], effect[there], k * effect.shape[1])
    else:
        means = [mean_over_pairs(values) for values in (estimate, effect)]
        there = ~np.isnan(means[1])
        measures = agreement(means[0][there], means[1][there], k)
    bounds = intervals(estimate, effect, resamples)
    return {
        **vars(measures),
        "pearson_low": bounds["pearson"][0],
        "pearson_high": bounds["pearson"][1],
        "spearman_low": bounds["spearman"][0],
        "spearman_high": bounds["spearman"][1],
        "jaccard": stability(estimate, k).jaccard,
    }


def _scores(
    effects: dict[str, np.ndarray],
    columns: dict[tuple[str, str], np.ndarray],
    components: Sequence[str],
    methods: Sequence[Estimator],
    n_layers: int,
    intervals_of: dict[str, Reliability],
) -> pd.DataFrame:
    """Every score averaged over pairs, methods beside the effect of patching."""
    frames = []
    for name in components:
        mean = mean_over_pairs(effects[name])
        width = len(mean) // n_layers
        frame = pd.DataFrame(
            {
                "component": name,
                "layer": np.repeat(np.arange(n_layers), width),
                "index": np.tile(np.arange(width), n_layers),
                "patching": mean,
            }
        )
        for method in methods:
            frame[method.name] = columns.get((method.name, name), np.nan)
        if name in intervals_of:
            frame = frame.assign(**vars(intervals_of[name]))
        tested = stability(effects[name], max(3, len(mean) // 10))
        frames.append(frame.assign(top_frequency=tested.frequency, q_value=tested.q_value))
    return pd.concat(frames, ignore_index=True)
