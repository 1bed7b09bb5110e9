"""Rank the heads or neurons of a model over a set of prompt pairs: mean score, its error, and whether other pairs would say the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Direction, Run, resolve_component, resolve_direction, resolve_run
from analyses.datasets.pass_size import pairs_per_pass
from analyses.datasets.streaming import PairStream
from analyses.evaluation.ranking_certified import certified
from analyses.evaluation.ranking_check import Replacement, ablate_top
from analyses.evaluation.ranking_sums import RankingSums
from analyses.methods import Estimator, estimator
from analyses.models.structure import n_heads, n_layers
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import RelevanceError, Target
from lens_relevance.errors import OutOfRangeError
from lens_relevance.hooks.model_state import left_as_found


def rank_heads(
    model: TransformerBridge,
    pairs: PromptPairs | str | Int[Tensor, "n pos"],
    method: str | Estimator | Target = "combined",
    *,
    against: str | Int[Tensor, "n pos"] | None = None,
    run: Run = "corrupt",
    top_k: int | None = None,
    batch_size: int | None = None,
    ablate: bool | Replacement = False,
    certify: int | None = None,
    direction: Direction = "mean",
    checkpoint: str | Path | None = None,
    component: str = "heads",
) -> pd.DataFrame:
    """Attention heads by their part in what the target says of clean against corrupt, largest magnitude first.

    Args:
        pairs: clean and corrupt prompts with their target. One pair can be given in parts, as for `propagate`:
            `rank_heads(model, prompt, logit_diff(" Mary", " John"), against=other)`.
        method: a ruleset or another method of `analyses.methods`; the score of a head is its estimate of the effect of patching z. In its
            place stands the target of a pair that is given in parts.
        against: the counterpart of a prompt.
        run: where coefficients are taken: "corrupt", "clean" or their "mean" (one and the same for `combined` and `deeplift`).
        top_k: what counts as "in the top", by magnitude; a tenth of the heads, 3 at least, by default.
        batch_size: pairs per pass; None for as many as fit (see `analyses.datasets.pass_size`).
        ablate: verify the ranking by ablating its top k, and k random heads, to their values in the corrupt run ("corrupt", or True) or
            to their mean over the clean prompts ("mean"): the result's `attrs["ablation"]`, an `AblationCheck`.
        certify: patch heads until the first `certify` places are settled, given the intervals (see `evaluation.certification`); the
            result's `attrs["certificate"]`, a `Certificate`, says what that took. Needs a method with intervals, as `combined` is.
        direction: the yardstick of `certify`: denoising, noising, or the mean of both.
        checkpoint: a folder; an interrupted run that is started again with the same arguments goes on from there (see `PairStream`).
        component: what of a head is scored: what it gives ("heads"), or its queries, keys or values (under grouped-query attention there
            is a row per key-value head).

    Returns:
        A row per head: layer, head, score (mean over pairs, in the units of the target), standard_error, top_share (share of pairs in
        which the head is among the top k), top_frequency (share of bootstrap resamples of the pairs in which it is) and q_value (the
        smallest false-discovery rate at which it counts as different from 0: see `evaluation.stability`; `attrs["stability"]` sums it up).
        Of a method with intervals also low, high and reliable (see `evaluation.reliability`), and with `certify` source, "estimated" or
        "patched": what has been patched has its effect as score, low and high.

    Under `accelerate launch` each process takes its share of the pairs, and all return the whole ranking.
    """
    if resolve_component(component).index != "head":
        raise RelevanceError(f"rank_heads ranks heads, q, k or v, not {component!r}")
    top_k = top_k if top_k is not None else max(3, n_layers(model) * n_heads(model) // 10)
    asked = _Asked(component, run, top_k, batch_size, ablate, certify, direction, checkpoint)
    return _rank(model, *_read(model, pairs, method, against), asked)


def rank_neurons(
    model: TransformerBridge,
    pairs: PromptPairs | str | Int[Tensor, "n pos"],
    method: str | Estimator | Target = "combined",
    *,
    against: str | Int[Tensor, "n pos"] | None = None,
    run: Run = "corrupt",
    top_k: int | None = None,
    batch_size: int | None = None,
    ablate: bool | Replacement = False,
    certify: int | None = None,
    direction: Direction = "mean",
    layer: int | None = None,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """MLP neurons (after the activation), as `rank_heads` ranks heads; the column of the index is `neuron`.

    Args:
        top_k: 10 by default.
        layer: rank the neurons of this layer alone.
    """
    top_k = 10 if top_k is None else top_k
    asked = _Asked("neurons", run, top_k, batch_size, ablate, certify, direction, checkpoint, layer)
    return _rank(model, *_read(model, pairs, method, against), asked)


def rank_positions(
    model: TransformerBridge,
    pairs: PromptPairs,
    method: str | Estimator = "combined",
    *,
    component: str = "attn",
    run: Run = "corrupt",
    top_k: int | None = None,
    batch_size: int | None = None,
    certify: int | None = None,
    direction: Direction = "mean",
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """Attention outputs (or MLP outputs, or the residual stream) by layer and position, as `rank_heads` ranks heads.

    The column of the index is `position`: prompts have to be aligned. `top_k` is 10 by default.

    Args:
        component: attn, mlp or resid.
    """
    if resolve_component(component).name not in ("attn", "mlp", "resid"):
        raise RelevanceError(f"rank_positions ranks attn, mlp or resid by position, not {component!r}")
    asked = _Asked(component, run, 10 if top_k is None else top_k, batch_size, False, certify, direction, checkpoint)
    return _rank(model, require_pairs(pairs), estimator(method), asked)


@dataclass(frozen=True)
class _Asked:
    """What a ranking was asked for; see `rank_heads`."""

    component: str
    run: Run
    top_k: int
    batch_size: int | None
    ablate: bool | Replacement
    certify: int | None
    direction: Direction
    checkpoint: str | Path | None
    layer: int | None = None


@left_as_found
def _rank(model: TransformerBridge, pairs: PromptPairs, method: Estimator, asked: _Asked) -> pd.DataFrame:
    kind, run, layer, top_k = resolve_component(asked.component), resolve_run(asked.run), asked.layer, asked.top_k
    _check(model, method, asked)
    if kind.index != "position":  # which stand for the same place in all rows
        pairs = pairs.by_length()
    size = asked.batch_size
    if size is None:
        size = pairs_per_pass(model, pairs, [method], [kind.name], run=run, checkpoint=asked.checkpoint)
    settings = {"method": method.name, "run": run, "top_k": top_k} | ({} if layer is None else {"layer": layer})
    stream = PairStream(model, pairs, size, checkpoint=asked.checkpoint, analysis=f"rank {kind.name}", **settings)
    layers = slice(None) if layer is None else slice(layer, layer + 1)
    totals = stream.fold(
        lambda: RankingSums(top_k, len(pairs), stream.first),
        lambda batch: method.with_bracket(model, batch if kind.index == "position" else batch.cropped(), kind.name, run=run)[:, :, layers],
        f"ranking {kind.name} by {method.name}",
    )
    ranking = totals.frame(kind)
    ranking["layer"] += layer or 0
    if asked.certify is not None:
        ranking = certified(model, stream, kind, ranking=ranking, k=asked.certify, direction=asked.direction)
    ranking = ranking.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)
    if asked.ablate:
        ranked = list(zip(ranking["layer"].tolist(), ranking[kind.index].tolist(), strict=True))
        replacement: Replacement = "corrupt" if asked.ablate is True else asked.ablate
        ranking.attrs["ablation"] = ablate_top(model, stream, kind, ranked=ranked, k=top_k, replacement=replacement)
    return ranking


def _read(
    model: TransformerBridge, pairs: PromptPairs | str | Tensor, method: str | Estimator | Target, against: str | Tensor | None
) -> tuple[PromptPairs, Estimator]:
    """Pairs and a method, or the one pair that a prompt, its target and its counterpart make."""
    if isinstance(method, Target) and against is not None and not isinstance(pairs, PromptPairs):
        return PromptPairs.of(model, pairs, against, target=method), estimator("combined")
    if isinstance(method, Target) or against is not None:
        raise RelevanceError(
            "one pair is given as rank_heads(model, prompt, target, against=other), for instance with the target "
            'logit_diff(" Mary", " John"); several as PromptPairs, which hold their own target and counterparts'
        )
    return require_pairs(pairs), estimator(method)


def _check(model: TransformerBridge, method: Estimator, asked: _Asked) -> None:
    """Refuse what cannot be ranked, before the model runs."""
    resolve_direction(asked.direction)
    if asked.top_k < 1:
        raise RelevanceError(f"top_k is a number of components, at least 1, not {asked.top_k}")
    if asked.ablate not in (False, True, "corrupt", "mean"):
        raise RelevanceError(f'ablate is "corrupt" (or True), "mean" or False, not {asked.ablate!r}')
    if asked.certify is not None and asked.certify < 1:
        raise RelevanceError(f"certify is a number of places, at least 1, not {asked.certify}")
    if asked.certify is not None and method.bracket is None:
        raise RelevanceError(f"{method.name} has no intervals, so it cannot be certified what comes first; choose the method combined")
    if asked.layer is not None and not 0 <= asked.layer < n_layers(model):
        raise OutOfRangeError(f"there is no layer {asked.layer}, the model has {n_layers(model)} layers")
