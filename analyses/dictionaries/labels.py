"""What features write: the tokens whose logits a decoder row raises and lowers most, past all later layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import CoverageError, Dictionary, RelevanceError
from lens_relevance.rules import Linear
from lens_relevance.rules.normalization import Norm
from lens_relevance.sites import anatomy


@torch.no_grad()
def label_features(model: TransformerBridge, dictionary: Dictionary, features: Sequence[int], *, k: int = 5) -> pd.DataFrame:
    """The top tokens of features that write to the residual stream.

    Later layers are left out, and so is the size of the final norm, which differs from token to token; its weight and its centring act.

    Returns:
        A row per feature: feature, raises and lowers (k tokens each, largest effect first, separated by " | ").

    Raises:
        RelevanceError: A feature out of range, a dictionary that writes vectors of another size, or a model without tokenizer.
        CoverageError: A model whose output head is not linear.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise RelevanceError("labels are tokens, and this model has no tokenizer")
    if outside := [i for i in features if not 0 <= i < dictionary.n_features]:
        raise RelevanceError(f"feature {outside[0]} is out of range; {dictionary!r} has {dictionary.n_features}")
    effects = _logits(model, dictionary.decoder[-1][list(features)])
    rows = []
    for feature, effect in zip(features, effects, strict=True):
        top = {name: (sign * effect).topk(k).indices.tolist() for name, sign in (("raises", 1), ("lowers", -1))}
        rows.append({"feature": feature} | {name: " | ".join(tokenizer.decode([i]) for i in ids) for name, ids in top.items()})
    return pd.DataFrame(rows, columns=["feature", "raises", "lowers"])


def _logits(model: TransformerBridge, written: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
    """What vectors of the residual stream add to the logits, up to the norm's size, less their mean."""
    sites = {site.name: site.operation for site in anatomy(model).sites}
    unembed, norm = sites.get("unembed"), sites.get("ln_final")
    if not isinstance(unembed, Linear):
        raise CoverageError("this model has no straight way from the residual stream to the logits: its output head is not linear")
    if written.shape[1] != unembed.weight.shape[1]:
        raise RelevanceError(
            f"the dictionary writes vectors of size {written.shape[1]}, and the residual stream has {unembed.weight.shape[1]}"
        )
    written = written.to(unembed.weight)
    written = norm.weighted(norm.centre(written)) if isinstance(norm, Norm) else written
    logits = written @ unembed.weight.T
    return logits - logits.mean(-1, keepdim=True)
