"""Perturbation tests of attributions on prompts: curves, and their picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.progress import progress_bar
from analyses.methods import Estimator
from analyses.perturbation.attributions import Attribution, attribution
from analyses.perturbation.removal import ORDERS, removable_tokens, removal_curves, removal_steps
from analyses.perturbation.removal_runs import Removal
from analyses.perturbation.text import TextRemoval
from analyses.views.page import View
from analyses.views.plots import curve_view
from lens_relevance import RelevanceError, Target
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, tokenize
from lens_relevance.inputs.targets import AnyTarget, as_target, top_prediction

AT_ONCE = 1024  # removals that are evaluated together


@left_as_found
def perturbation_curves(
    model: TransformerBridge,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    methods: Sequence[str | Estimator] | Mapping[str, str | Estimator | Attribution] = ("attnlrp",),
    baselines: Sequence[str] = ("mean_embedding",),
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
    steps: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    """MoRF and LeRF curves of each method with each baseline, and of a random order on the same prompts.

    Each prompt's first token (BOS) is never removed.

    Source: Samek et al. 2017, arXiv 1509.06321; the area between the two orders as in AttnLRP (arXiv 2402.05602).

    Args:
        inputs, target, attention_mask: as for `propagate`; without a target each prompt's top prediction is explained against the
            runner-up.
        methods: names or Estimators (see `attribution`), or name -> one of these or a callable (model, tokens, target, mask) ->
            [batch, pos], for example `{"deeplift, 8 random": against(random_tokens(8))}`.
        baselines: of `BASELINES`: what stands where a token was removed.
        steps: in how many steps all tokens go; None for one by one.
        seed: of the random order and of random tokens.
        batch_size: rows per forward pass.

    Returns:
        Columns method, baseline, example, order (MoRF, LeRF), removed, share, value (units of the target), same_prediction; `areas` and
        `summary` condense it.

    Raises:
        RelevanceError: no method or no baseline, an unknown one, or scores that do not fit the prompts.
    """
    named = named_methods(methods)
    if not named or not baselines:
        raise RelevanceError("give at least one method and one baseline")
    chosen = {name: attribution(method) for name, method in ({"random": "random"} | named).items()}
    tokens, mask = tokenize(model, inputs, attention_mask)
    if target is None:
        with torch.no_grad():
            padded = {} if bool((mask == 1).all()) else {"attention_mask": mask}
            resolved: Target = top_prediction(model(tokens, return_type="logits", use_cache=False, **padded), tokens, mask)
    else:
        resolved = as_target(target)
    removable = removable_tokens(mask)
    with progress_bar() as bar:
        scores = {n: chosen[n](model, tokens, resolved, mask).detach().cpu() for n in bar.track(chosen, description="attributions")}
    removals = [
        TextRemoval(model, tokens, mask, target=resolved, baseline=baseline, seed=seed, batch_size=batch_size) for baseline in baselines
    ]
    return curves_of(scores, removable, removals, steps=steps)


def named_methods(methods: Sequence[str | Estimator] | Mapping[str, Any]) -> dict[str, Any]:
    """Methods by the names that stand in tables: their own, where none are given."""
    if isinstance(methods, Mapping):
        return dict(methods)
    return {method if isinstance(method, str) else method.name: method for method in methods}


def curves_of(
    scores: Mapping[str, Float[Tensor, "batch item"]],
    removable: Bool[Tensor, "batch item"],
    removals: Sequence[Removal],
    *,
    steps: int | None = None,
) -> pd.DataFrame:
    """MoRF and LeRF curves of scores [batch, item] by name, with every evaluator of removals: text tokens, image patches, embeddings.

    Columns and `steps` as for `perturbation_curves`.
    """
    frames, removable = [], removable.cpu()
    orders = [removal_steps(s.detach().cpu(), removable, order, steps=steps) for s in scores.values() for order in ORDERS]
    rows, removed = (torch.cat(parts) for parts in zip(*orders, strict=True))
    with progress_bar() as bar:
        # what all methods remove from some examples at once: many of these prompts recur, and more begin alike
        groups = rows.unique().split(max(1, AT_ONCE * len(removable) // len(rows)))
        for removal, group in bar.track([(r, g) for r in removals for g in groups], description="removing"):
            chosen = torch.isin(rows, group)
            removal(rows[chosen], removed[chosen])
    for name in scores:
        for removal in removals:
            frame = removal_curves(scores[name].detach().cpu(), removable, removal, steps=steps)
            frame.insert(0, "baseline", removal.baseline)
            frame.insert(0, "method", name)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def curves_view(curves: pd.DataFrame, baseline: str | None = None) -> View:
    """Mean curves over the share of tokens removed, MoRF and LeRF of every method, for one baseline (the first by default).

    Raises:
        RelevanceError: no curves of that baseline.
    """
    baseline = baseline if baseline is not None else str(curves["baseline"].iloc[0])
    shown = curves[curves["baseline"] == baseline]
    if shown.empty:
        raise RelevanceError(f"there are no curves for the baseline {baseline!r}; these have {', '.join(curves['baseline'].unique())}")
    # prompts differ in length: twenty bins put their curves on one axis
    binned = shown.assign(share=(shown["share"] * 20).round() / 20)
    grouped = binned.groupby(["method", "order"], sort=False)
    series = {f"{method}, {order}": part.groupby("share")["value"].mean() for (method, order), part in grouped}
    return curve_view(series, "share of tokens removed", "target", title=f"Perturbation ({baseline})")
