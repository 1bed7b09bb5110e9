"""Rank the heads or neurons of a model over a set of prompt pairs: mean score, standard error, and how often each is in the top k."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Run, resolve_component, resolve_run
from analyses.datasets.pass_size import pairs_per_pass
from analyses.datasets.streaming import PairStream
from analyses.evaluation.ranking_check import Replacement, ablate_top
from analyses.methods import Estimator, estimator
from analyses.models.structure import n_heads, n_layers
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import RelevanceError
from lens_relevance.hooks.model_state import left_as_found


def rank_heads(
    model: TransformerBridge,
    pairs: PromptPairs,
    method: str | Estimator = "deeplift",
    *,
    run: Run = "corrupt",
    top_k: int | None = None,
    batch_size: int | None = None,
    ablate: bool | Replacement = False,
    checkpoint: str | Path | None = None,
    component: str = "heads",
) -> pd.DataFrame:
    """Attention heads by their part in what the target says of clean against corrupt, largest magnitude first.

    Args:
        method: a ruleset or another method of `analyses.methods`; the score of a head is its estimate of the effect of patching z.
        run: where coefficients are taken: "corrupt", "clean" or their "mean" (one and the same for `deeplift`).
        top_k: what counts as "in the top" for a single pair, by magnitude; a tenth of the heads, 3 at least, by default.
        batch_size: pairs per pass; None for as many as fit (see `analyses.datasets.pass_size`).
        ablate: verify the ranking by ablating its top k, and k random heads, to their values in the corrupt run ("corrupt", or True) or
            to their mean over the clean prompts ("mean"): the result's `attrs["ablation"]`, an `AblationCheck`.
        checkpoint: a folder; an interrupted run that is started again with the same arguments goes on from there (see `PairStream`).
        component: what of a head is scored: what it gives ("heads"), or its queries, keys or values (under grouped-query attention there
            is a row per key-value head). `method="atp_star"` recomputes the softmax for queries and keys.

    Returns:
        A row per head: layer, head, score (mean over pairs, in the units of the target), standard_error, top_share (share of pairs in
        which the head is among the top k).

    Under `accelerate launch` each process takes its share of the pairs, and all return the whole ranking.
    """
    if resolve_component(component).index != "head":
        raise RelevanceError(f"rank_heads ranks heads, q, k or v, not {component!r}")
    top_k = top_k if top_k is not None else max(3, n_layers(model) * n_heads(model) // 10)
    return _rank(model, require_pairs(pairs), estimator(method), run, component, top_k, batch_size, ablate, checkpoint)


def rank_neurons(
    model: TransformerBridge,
    pairs: PromptPairs,
    method: str | Estimator = "deeplift",
    *,
    run: Run = "corrupt",
    top_k: int | None = None,
    batch_size: int | None = None,
    ablate: bool | Replacement = False,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """MLP neurons (after the activation), as `rank_heads` ranks heads: columns layer, neuron, score, standard_error, top_share.

    `top_k` is 10 by default.
    """
    top_k = 10 if top_k is None else top_k
    return _rank(model, require_pairs(pairs), estimator(method), run, "neurons", top_k, batch_size, ablate, checkpoint)


@left_as_found
def _rank(
    model: TransformerBridge,
    pairs: PromptPairs,
    method: Estimator,
    run: Run,
    name: str,
    top_k: int,
    batch_size: int | None,
    ablate: bool | Replacement,
    checkpoint: str | Path | None,
) -> pd.DataFrame:
    if top_k < 1:
        raise RelevanceError(f"top_k is a number of components, at least 1, not {top_k}")
    if ablate not in (False, True, "corrupt", "mean"):
        raise RelevanceError(f'ablate is "corrupt" (or True), "mean" or False, not {ablate!r}')
    kind, run = resolve_component(name), resolve_run(run)
    size = batch_size if batch_size is not None else pairs_per_pass(model, pairs, [method], [kind.name], run=run, checkpoint=checkpoint)
    stream = PairStream(model, pairs, size, checkpoint=checkpoint, analysis=f"rank {kind.name}", method=method.name, run=run, top_k=top_k)
    totals = stream.fold(
        lambda: _Totals(top_k),
        lambda batch: method(model, batch, [kind.name], run=run)[kind.name],
        f"ranking {kind.name} by {method.name}",
    )
    ranking = totals.frame(kind.index)
    if ablate:
        ranked = list(zip(ranking["layer"].tolist(), ranking[kind.index].tolist(), strict=True))
        replacement: Replacement = "corrupt" if ablate is True else ablate
        ranking.attrs["ablation"] = ablate_top(model, stream, kind, ranked=ranked, k=top_k, replacement=replacement)
    return ranking


class _Totals:
    """Running sums over pairs, from which mean, standard error and top shares follow; nothing is kept per pair."""

    def __init__(self, top_k: int) -> None:
        self.top_k, self.count = top_k, 0

    def add(self, scores: Float[Tensor, "batch layer index"]) -> None:
        """Take in the scores of a batch."""
        scores = scores.detach().double().cpu()
        flat, mean = scores.flatten(1), scores.mean(0)
        top = torch.zeros_like(flat).scatter_(1, flat.abs().topk(min(self.top_k, flat.shape[1])).indices, 1.0).sum(0).reshape(mean.shape)
        self.merge({"count": torch.tensor(len(scores)), "mean": mean, "deviations": ((scores - mean) ** 2).sum(0), "top": top})

    def state(self) -> dict[str, Tensor]:
        """The sums so far, as tensors."""
        if not self.count:
            return {}
        return {"count": torch.tensor(self.count), "mean": self.mean, "deviations": self.deviations, "top": self.top}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in the sums of other pairs."""
        count, mean, deviations, top = int(state["count"]), state["mean"], state["deviations"], state["top"]
        if not self.count:
            self.count, self.mean, self.deviations, self.top = count, mean, deviations, top
            return
        # Chan et al. 1983: sums of squared deviations of two batches as one, without the cancellation of a plain sum of squares.
        total, change = self.count + count, mean - self.mean
        self.deviations = self.deviations + deviations + change**2 * self.count * count / total
        self.mean = self.mean + change * count / total
        self.top, self.count = self.top + top, total

    def frame(self, name: str) -> pd.DataFrame:
        """The ranking, with the column `name` for the index within a layer."""
        layers, index = (axis.flatten().tolist() for axis in torch.meshgrid(*map(torch.arange, self.mean.shape), indexing="ij"))
        # One pair has no spread, and so no standard error.
        variance = self.deviations / (self.count - 1) if self.count > 1 else torch.full_like(self.mean, torch.nan)
        frame = pd.DataFrame(
            {
                "layer": layers,
                name: index,
                "score": self.mean.flatten().tolist(),
                "standard_error": (variance / self.count).sqrt().flatten().tolist(),
                "top_share": (self.top / self.count).flatten().tolist(),
            }
        )
        return frame.sort_values("score", key=abs, ascending=False, kind="stable").reset_index(drop=True)
