"""Forwards of the model, and what they hold at chosen HookPoints."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.logit_reading import without_logits

Recorded = dict[str, Tensor]


def forward(model: TransformerBridge, tokens: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]) -> Tensor:
    """Logits [row, pos, d_vocab]."""
    hidden = {} if bool((mask == 1).all()) else {"attention_mask": mask}
    logits = model(tokens, return_type="logits", use_cache=False, **hidden)
    assert isinstance(logits, Tensor)
    return logits


def record(model: TransformerBridge, tokens: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"], *, names: list[str]) -> Recorded:
    """Activations at `names` in a run of the model."""
    recorded: Recorded = {}

    def keep(x: Tensor, hook: Any, name: str) -> Tensor:
        recorded[name] = x.detach()
        return x

    hooks = [(name, lambda x, hook, name=name: keep(x, hook, name)) for name in names]
    with torch.no_grad(), without_logits(model, tokens), model.hooks(fwd_hooks=hooks):
        forward(model, tokens, mask)
    return recorded


def replacements(model: TransformerBridge, tokens: Tensor, mask: Tensor, *, names: list[str], mean_tokens: Tensor | None) -> Recorded:
    """What removed items are set to: values of these (corrupt) prompts, or their mean over `mean_tokens`."""
    if mean_tokens is None:
        return record(model, tokens, mask, names=names)
    of_mean_prompts = record(model, mean_tokens, torch.ones_like(mean_tokens), names=names)
    return {name: x.mean(0, keepdim=True).expand(len(tokens), *x.shape[1:]) for name, x in of_mean_prompts.items()}
