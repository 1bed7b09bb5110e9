"""Removing items one after another, in an order given by scores: text tokens, image patches, whatever can be removed.

MoRF removes the most relevant first, LeRF the least relevant first (Samek et al. 2017). The area between the two curves is AttnLRP's
measure (arXiv 2402.05602): higher is better, and 0 is what a random order gets on average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lens_relevance import RelevanceError

ORDERS: tuple[Literal["MoRF", "LeRF"], ...] = ("MoRF", "LeRF")

Evaluate = Callable[[Int[Tensor, " n"], Bool[Tensor, "n item"]], tuple[Float[Tensor, " n"], Shaped[Tensor, " n"]]]
"""(rows [n], removed [n, item]) -> (target [n], whether the prediction is still that of the whole input [n])."""


def removable_tokens(mask: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Tokens that may be removed, on the CPU: all real ones but each prompt's first (BOS)."""
    return (mask.bool() & (mask.cumsum(1) > 1)).cpu()


def removal_ranks(scores: Tensor, removable: Bool[Tensor, "batch item"], order: Literal["MoRF", "LeRF"]) -> Int[Tensor, "batch item"]:
    """When each item is removed, by scores [batch, item], 0 first; what may not be removed comes last. Ties go by position.

    Raises:
        RelevanceError: scores of another shape than the items, or that are not finite.
    """
    if scores.shape != removable.shape:
        raise RelevanceError(f"the attribution has shape {tuple(scores.shape)}, the inputs {tuple(removable.shape)}; give one per item")
    if not bool(torch.isfinite(scores[removable]).all()):
        raise RelevanceError("the attribution holds values that are not finite, so there is no order to remove by")
    signed = scores.double() if order == "LeRF" else -scores.double()
    return signed.masked_fill(~removable, float("inf")).sort(dim=-1, stable=True).indices.argsort(-1)


def removal_curves(
    scores: Float[Tensor, "batch item"], removable: Bool[Tensor, "batch item"], evaluate: Evaluate, *, steps: int | None = None
) -> pd.DataFrame:
    """Both curves of every example.

    Source: Samek et al. 2017, arXiv 1509.06321.

    Args:
        scores: [batch, item].
        removable: which items may be removed.
        evaluate: see `Evaluate`.
        steps: in how many steps everything goes, equal in size as far as can be; None for one item at a time.

    Returns:
        Columns example, order, removed (count), share (of what is removable), value, same_prediction.

    Raises:
        RelevanceError: an example from which nothing can be removed, and as `removal_ranks`.
    """
    count = removable.sum(1).cpu()
    frames = []
    for order in ORDERS:
        rows, removed = removal_steps(scores, removable, order, steps=steps)
        value, same = evaluate(rows, removed)
        frames.append(
            pd.DataFrame(
                {
                    "example": rows.numpy(),
                    "order": order,
                    "removed": removed.sum(1).numpy(),
                    "share": (removed.sum(1) / count[rows]).numpy().astype(float),
                    "value": value.double().cpu().numpy(),
                    "same_prediction": same.double().cpu().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def removal_steps(
    scores: Tensor, removable: Bool[Tensor, "batch item"], order: Literal["MoRF", "LeRF"], *, steps: int | None = None
) -> tuple[Int[Tensor, " n"], Bool[Tensor, "n item"]]:
    """The examples and what is removed from each at every step of an order; arguments and errors as for `removal_curves`."""
    count = removable.sum(1).cpu()
    if bool((count == 0).any()):
        raise RelevanceError(f"nothing can be removed from example(s) {(count == 0).nonzero().flatten().tolist()}; give longer inputs")
    levels = [np.unique(np.linspace(0, n, (min(n, steps) if steps else n) + 1).round().astype(int)) for n in count.tolist()]
    rows = torch.tensor([i for i, level in enumerate(levels) for _ in level])
    ranks = removal_ranks(scores, removable, order).cpu()
    return rows, ranks[rows] < torch.tensor(np.concatenate(levels)).unsqueeze(1)


def areas(curves: pd.DataFrame) -> pd.DataFrame:
    """Areas under both curves over the share removed, in units of the target.

    Returns:
        One row per method, baseline and example. Columns morf, lerf: area under the target's curve; area: lerf - morf (higher is better);
        positive, negative: the same under the share of predictions that stay, most (least) relevant first, which are the positive and
        negative tests of Chefer et al. 2021 (lower, higher is better); above_random: area less that of the random order on the same
        example, where the curves hold one.
    """
    keys = [name for name in ("method", "baseline") if name in curves] + ["example"]
    parts = []
    for key, part in curves.groupby([*keys, "order"], sort=False):
        part = part.sort_values("share")
        both = {column: float(np.trapezoid(part[column], part["share"])) for column in ("value", "same_prediction")}
        parts.append(dict(zip([*keys, "order"], key, strict=True)) | both)
    wide = pd.DataFrame(parts).pivot(index=keys, columns="order", values=["value", "same_prediction"])
    result = pd.DataFrame(
        {
            "morf": wide["value", "MoRF"],
            "lerf": wide["value", "LeRF"],
            "area": wide["value", "LeRF"] - wide["value", "MoRF"],
            "positive": wide["same_prediction", "MoRF"],
            "negative": wide["same_prediction", "LeRF"],
        }
    ).reset_index()
    if "method" in result and (result["method"] == "random").any():
        others = [name for name in keys if name != "method"]
        chance = result.loc[result["method"] == "random", [*others, "area"]].rename(columns={"area": "chance"})
        result = result.merge(chance, on=others, how="left")
        result["above_random"] = result["area"] - result.pop("chance")
    return result


def summary(table: pd.DataFrame, confidence: float = 0.95, draws: int = 1000, *, seed: int = 0) -> pd.DataFrame:
    """Means over examples of what `areas` gave, with a bootstrap interval over examples for the area (area_low, area_high)."""
    keys = [name for name in ("method", "baseline") if name in table]
    rng, rows = np.random.default_rng(seed), []
    for key, part in table.groupby(keys, sort=False):
        drawn = part["area"].to_numpy()[rng.integers(len(part), size=(draws, len(part)))].mean(1)
        low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
        means = part.drop(columns=[*keys, "example"]).mean().to_dict()
        rows.append(dict(zip(keys, key, strict=True)) | means | {"area_low": low, "area_high": high, "examples": len(part)})
    return pd.DataFrame(rows)
