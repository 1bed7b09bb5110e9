"""What analyses need to know of a model's structure, or the reason why it cannot be told."""

from __future__ import annotations

from typing import Any

from lens_relevance.errors import RelevanceError


def n_layers(model: Any) -> int:
    """Number of blocks of a model with one stack of blocks.

    Raises:
        RelevanceError: the model has none, or two (an encoder and a decoder).
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None:
        raise RelevanceError("this analysis needs a model with one stack of blocks (model.blocks); encoder-decoder models have two")
    return len(blocks)


def n_heads(model: Any) -> int:
    """Number of attention heads in each block.

    Raises:
        RelevanceError: as `n_layers`.
    """
    n_layers(model)
    return int(model.cfg.n_heads)
