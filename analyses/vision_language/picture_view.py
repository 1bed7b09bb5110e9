"""Relevance of patches, drawn beside the picture that was asked about."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from analyses.views.markup import format_number, table_html
from analyses.views.page import View
from analyses.views.palette import INK, SIGNED, limit_of, new_figure
from analyses.vision_language.pictures import GRID, PATCH, SIDE
from lens_relevance import RelevanceError


def picture_view(
    image: Float[Tensor, "3 side side"],
    relevance: Mapping[str, Float[Tensor, " patch"]],
    title: str,
    *,
    relevant: Bool[Tensor, " patch"] | None = None,
) -> View:
    """The picture, and each method's patches in colour, on a scale of its own (written below it).

    Args:
        relevance: name -> one score per patch, row by row.
        relevant: patches to outline: those an answer rests on.

    Raises:
        RelevanceError: a method has another number of patches than the picture.
    """
    scores = {name: one.detach().double().cpu().numpy() for name, one in relevance.items()}
    for name, values in scores.items():
        if values.shape != (GRID * GRID,):
            raise RelevanceError(f"{name} has {values.size} scores, the picture {GRID * GRID} patches")
    outlined = np.zeros(GRID * GRID, dtype=bool) if relevant is None else relevant.cpu().numpy()
    table = pd.DataFrame(scores).rename_axis("patch")
    note = f"<details><summary>The numbers</summary>{table_html(table)}</details>"
    return View(title, lambda: _figure(image.permute(1, 2, 0).clamp(0, 1).numpy(), scores, outlined), note=note)


def _figure(picture: np.ndarray, scores: Mapping[str, np.ndarray], outlined: np.ndarray) -> Figure:
    figure = new_figure(1.75 * (len(scores) + 1), 2.1)
    axes = figure.subplots(1, len(scores) + 1, squeeze=False)[0]
    axes[0].imshow(picture, extent=(0, SIDE, SIDE, 0))
    axes[0].set_title("picture")
    for axis, (name, values) in zip(axes[1:], scores.items(), strict=True):
        limit = limit_of(values)
        axis.imshow(values.reshape(GRID, GRID), cmap=SIGNED, vmin=-limit, vmax=limit, extent=(0, SIDE, SIDE, 0))
        axis.set_title(name)
        axis.set_xlabel(f"± {format_number(limit, False)}", fontsize=8)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        _outline(axis, outlined.reshape(GRID, GRID))
    return figure


def _outline(axis: Axes, patches: np.ndarray) -> None:
    """A line around the outlined patches."""
    inside = np.pad(patches, 1)
    for row, column in np.argwhere(patches):
        y, x = row * PATCH, column * PATCH
        sides = {
            (0, 1): ([x, x + PATCH], [y, y]),
            (2, 1): ([x, x + PATCH], [y + PATCH, y + PATCH]),
            (1, 0): ([x, x], [y, y + PATCH]),
            (1, 2): ([x + PATCH, x + PATCH], [y, y + PATCH]),
        }
        for (down, right), (xs, ys) in sides.items():
            if not inside[row + down, column + right]:
                axis.plot(xs, ys, color=INK, linewidth=1.2)
