"""MLP neurons: which ones count most, and at which tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from analyses.components import Node
from analyses.views.markup import as_array, check_tokens
from analyses.views.page import View
from analyses.views.tokens import token_multi_view
from lens_relevance.errors import RelevanceError


def neuron_view(
    tokens: Sequence[str],
    relevance: Mapping[int, Float[Tensor | np.ndarray, "pos d_mlp"]],
    top: int = 10,
    *,
    title: str = "Neurons with the most relevance",
) -> View:
    """The most relevant neurons of some layers, each colouring the tokens at which it counts (CircuitsVis `colored_tokens_multi`).

    Args:
        tokens: one string per position.
        relevance: layer -> relevance of its neurons at each position, `cache.neurons(layer)[example]`.
        top: how many neurons are shown, those with the largest |relevance| summed over positions first.

    Raises:
        RelevanceError: shapes that do not fit together, or a value that is not finite.
    """
    ranked = top_neurons(relevance, top)
    arrays = {layer: as_array(values, f"relevance[{layer}]") for layer, values in relevance.items()}
    for layer, array in arrays.items():
        check_tokens(tokens, len(array), f"relevance[{layer}]")
    pairs = zip(ranked["layer"], ranked["neuron"], strict=True)
    columns = {str(Node("neurons", int(layer), neuron=int(neuron))): arrays[int(layer)][:, int(neuron)] for layer, neuron in pairs}
    return token_multi_view(tokens, columns, title)


def top_neurons(relevance: Mapping[int, Float[Tensor | np.ndarray, "pos d_mlp"]], top: int = 10) -> pd.DataFrame:
    """The neurons with the largest |relevance| summed over positions: columns `layer`, `neuron`, `score` (that sum, signed), best first.

    Raises:
        RelevanceError: no layers, or relevance of another shape than [pos, d_mlp].
    """
    if not relevance:
        raise RelevanceError("relevance is empty: give at least one layer's neurons")
    frames = []
    for layer, values in relevance.items():
        array = as_array(values, f"relevance[{layer}]")
        if array.ndim != 2:
            raise RelevanceError(f"relevance[{layer}] has the shape {array.shape}; give [pos, d_mlp] of one example")
        totals = array.sum(axis=0)
        frames.append(pd.DataFrame({"layer": layer, "neuron": np.arange(len(totals)), "score": totals}))
    together = pd.concat(frames, ignore_index=True)
    order = together["score"].abs().sort_values(ascending=False, kind="stable").index[:top]
    return together.loc[order].reset_index(drop=True)
