"""Which method can be trusted: every estimate held against activation patching, on the same pairs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Direction, Run, resolve_component, resolve_direction, resolve_run
from analyses.datasets.batches import rows_together
from analyses.datasets.pass_size import pairs_per_pass
from analyses.datasets.streaming import PairStream
from analyses.evaluation.agreement import agreement, intervals, mean_over_pairs
from analyses.methods import Estimator, estimator
from analyses.models.structure import n_layers
from analyses.patching import activation_patching
from analyses.patching.checks import check_gap
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import RelevanceError
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.targets import as_target

METHODS = (
    *("deeplift", "deeplift_ln", "relp", "attnlrp", "cp_lrp", "gim", "gradient", "eap_ig", "conductance", "direct_logit_attribution"),
    *("weighted_accumulation", "chefer_2021b"),
)
COMPONENTS = ("resid", "attn", "mlp", "heads")
COLUMNS = (
    *("method", "component", "pearson", "spearman", "sign_agreement", "top_k_overlap", "magnitude_error", "completeness"),
    *("forwards", "backwards", "seconds", "pearson_low", "pearson_high", "spearman_low", "spearman_high"),
)
_COMPARED = ("resid", "attn", "mlp", "heads", "q", "k", "v")
# A pass of patching holds many patches anyway; with few pairs at a time the bar moves, and an interruption costs little.
_PAIRS_PATCHED = 16


@dataclass(frozen=True)
class Comparison:
    """Estimates and effects, and the table of their agreement.

    Attributes:
        table: as `compare_with_patching` returns it.
        scores: one row per component and index: component, layer, position or head (`index`), patching, and one column per method; averaged
            over pairs.
        patching_seconds: what the yardstick cost.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    patching_seconds: float
    n_pairs: int
    direction: str

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
) -> pd.DataFrame:
    """How well each method agrees with activation patching: one row per method and component, best mean correlation first.

    Args:
        methods: names (`analyses.methods`) or Estimators.
        components: resid, attn and mlp by layer and position; heads, q, k and v by layer and head, all positions together.
        direction: the yardstick: denoising, noising, or the mean of both.
        run: where the estimates take their coefficients.
        top_k: size of the sets that top_k_overlap compares; a tenth of the components, 3 at least, by default.
        pooled: correlate over components x pairs instead of over components of scores averaged over pairs.
        resamples: bootstrap resamples of the pairs for the 95 % intervals; 0 for none.
        batch_size: pairs per pass of the estimates; None for as many as fit.
        checkpoint: a folder; an interrupted run that is started again with the same arguments goes on from there (see `PairStream`).

    Columns: method, component; pearson, spearman, sign_agreement, top_k_overlap, magnitude_error (see `evaluation.agreement`); completeness
    (the largest error at any layer of "the residual stream's scores add up to m(clean) - m(corrupt)", as a share of that); forwards and
    backwards (passes over each pair) and seconds of the method, the same for all its components; pearson_low to spearman_high.

    Under `accelerate launch` each process takes its share of the pairs, and all return the whole table.

    Raises:
        RelevanceError: unknown methods or components, two methods of one name, or no pairs.
    """
    return compare(
        model,
        pairs,
        methods,
        components=components,
        direction=direction,
        run=run,
        top_k=top_k,
        pooled=pooled,
        resamples=resamples,
        batch_size=batch_size,
        checkpoint=checkpoint,
    ).table


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
    effects, gap, together, patching_seconds = _effects(model, stream, components, direction)
    rows: list[dict[str, Any]] = []
    columns: dict[tuple[str, str], np.ndarray] = {}
    for number, method in enumerate(chosen):
        wanted = [name for name in dict.fromkeys(("resid", *components)) if name in method.components]
        scores_by_component, seconds = stream.collect(f"{number} {method.name}", _estimate(model, method, wanted, run), method.name)
        scores = {name: values.permute(1, 2, 0).numpy() for name, values in scores_by_component.items()}  # [layer, index, pair]
        if together:
            scores = {name: values.sum(2, keepdims=True) for name, values in scores.items()}
        shared = {
            "completeness": _incompleteness(scores.get("resid"), gap),
            "forwards": method.forwards * method.passes(run),
            "backwards": method.backwards * method.passes(run),
            "seconds": seconds,
        }
        for name in [name for name in components if name in wanted]:
            estimate = scores[name].reshape(-1, scores[name].shape[2])
            rows.append({"method": method.name, "component": name, **_cell(estimate, effects[name], top_k, pooled, resamples), **shared})
            columns[method.name, name] = mean_over_pairs(estimate)
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
    return Comparison(table, _scores(effects, columns, components, chosen, n_layers(model)), patching_seconds, len(pairs), direction)


def _estimate(
    model: TransformerBridge, method: Estimator, components: Sequence[str], run: Run
) -> Callable[[PromptPairs], dict[str, torch.Tensor]]:
    """What a method says of a batch."""
    return lambda batch: method(model, batch, components, run=run)


def _incompleteness(resid: np.ndarray | None, gap: float) -> float:
    """How far the residual stream's scores [layer, pos, pair] are from adding up to the gap, at the worst layer, as a share of the gap."""
    if resid is None or not gap:
        return float("nan")
    return float(np.abs(resid.sum(1).mean(1) - gap).max() / abs(gap))


def _effects(
    model: TransformerBridge, stream: PairStream, components: Sequence[str], direction: Direction
) -> tuple[dict[str, np.ndarray], float, bool, float]:
    """Effects [component, pair] of each kind of component, layer by layer, and the mean gap between the runs; whether the metric is one
    number, and has one effect, for all pairs together; and the seconds it took."""

    def step(batch: PromptPairs) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*same value on clean and corrupt")  # said once, below, of all pairs
            patched = activation_patching(model, batch, components, direction=direction, progress=False)
        assert patched.corrupt is not None  # this is patching, not ablation
        rows = {name: [i for i, node in enumerate(patched.nodes) if node.component == name] for name in components}
        return {name: patched.effect[rows[name]].T for name in components} | {"clean": patched.clean, "corrupt": patched.corrupt}

    pairs = stream.pairs  # there can be more processes than pairs
    size = rows_together(model, as_target(pairs.target), pairs.clean, mask=pairs.clean_mask, size=_PAIRS_PATCHED) if len(pairs) else 1
    effects_by_component, seconds = stream.collect("patching", step, "activation patching", size=size)
    clean, corrupt = effects_by_component.pop("clean"), effects_by_component.pop("corrupt")
    if stream.processes.index == 0:
        check_gap(clean, corrupt)
    effects = {name: values.T.numpy() for name, values in effects_by_component.items()}
    return effects, float((clean - corrupt).mean()), len(clean) == 1 < len(pairs), seconds


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
    }


def _scores(
    effects: dict[str, np.ndarray],
    columns: dict[tuple[str, str], np.ndarray],
    components: Sequence[str],
    methods: Sequence[Estimator],
    n_layers: int,
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
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)
