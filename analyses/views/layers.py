"""Relevance on its way through the layers: one row per residual stream, one column per token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from analyses.views.heatmap import HeatMap, heat_map_view
from analyses.views.markup import as_array, check_tokens, show_token
from analyses.views.page import View
from analyses.views.palette import limit_of
from lens_relevance.errors import RelevanceError


def layer_view(
    tokens: Sequence[str],
    residual: Float[Tensor | np.ndarray, "pos cut"],
    labels: Sequence[str] | None = None,
    *,
    title: str = "Relevance through the layers",
) -> View:
    """Layer by token heat map of the residual stream's relevance, the embeddings at the bottom.

    Args:
        tokens: one string per position.
        residual: relevance of the residual stream at each position before each layer, and after the last one:
            `cache.residual()[example]`, of shape `[pos, layer + 1]`.
        labels: names of the rows, bottom first; by default `embed`, `0` to `n_layers - 1` (after that layer).

    Raises:
        RelevanceError: shapes that do not fit together, or a value that is not finite.
    """
    values = as_array(residual, "residual")
    if values.ndim != 2:
        raise RelevanceError(f"residual has the shape {values.shape}; give [pos, layer + 1] of one example")
    tokens = check_tokens(tokens, len(values), "residual")
    rows = list(labels) if labels is not None else ["embed", *map(str, range(values.shape[1] - 1))]
    if len(rows) != values.shape[1]:
        raise RelevanceError(f"residual has {values.shape[1]} layers but there are {len(rows)} labels")
    where = ["embeddings" if row == "embed" else f"after layer {row}" if labels is None else row for row in rows]
    names = [[f"“{token}” ({position}), {place}" for position, token in enumerate(tokens)] for place in reversed(where)]
    columns = [show_token(token) for token in tokens]
    heat_map = HeatMap(title, values.T[::-1], rows[::-1], columns, "after layer", "token", limit_of(values), names)
    return heat_map_view(title, [heat_map])
