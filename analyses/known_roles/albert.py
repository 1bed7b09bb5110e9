"""ALBERT for masked tokens, one layer called again and again, with a HookPoint for every call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lens_relevance.sites import TokenAttention, declare_sites
from lens_relevance.sites.hooked_module import HookedModule, sharing_copies

_LAYERS = "albert.encoder.albert_layer_groups"


def hooked_albert(model: PreTrainedModel, tokens: Tensor) -> HookedModule:
    """An ALBERT of one layer, unrolled and ready for `propagate`.

    Relevance starts at the input of the first call, where words, positions and token types are one vector.

    Args:
        model: in eval mode; it is changed in place, and its config says afterwards that every layer is a group of its own.
        tokens: [batch, pos], any ids of the vocabulary: what the model calls is seen on them.
    """
    config, encoder = model.config, model.get_submodule("albert.encoder")
    groups: Any = encoder.albert_layer_groups
    (layer,) = groups
    encoder.albert_layer_groups = sharing_copies(layer, config.num_hidden_layers)
    config.num_hidden_groups = config.num_hidden_layers
    hooked = HookedModule(model, {"input_ids": tokens})
    calls = [f"{_LAYERS}.{i}" for i in range(config.num_hidden_layers)]
    inner = [f"{call}.albert_layers.0" for call in calls]
    stream = [*(f"{call}.hook_in" for call in calls), f"{calls[-1]}.hook_out"]
    declare_sites(
        hooked,
        hooked.sites({_LAYERS: "blocks"}),
        embeddings=stream[:1],
        residual=stream,
        z=[f"{one}.attention.hook_z" for one in inner],
        neurons=[f"{one}.ffn_output.hook_in" for one in inner],
        attentions=[
            TokenAttention(f"{one}.attention.hook_pattern", f"{call}.hook_in", f"{one}.attention.dense.hook_out")
            for call, one in zip(calls, inner, strict=True)
        ],
    )
    return hooked
