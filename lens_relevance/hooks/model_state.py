"""The model is a guest: what a call changes on it is put back, also after an exception or Ctrl-C."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.hooks.versions import warn_if_untested


@contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """No parameter asks for a gradient inside; each flag is put back as it was found."""
    everything = [*torch.nn.Module.parameters(cast(torch.nn.Module, model)), *root(model).parameters()]
    asked = list({id(p): p for p in everything if p.requires_grad}.values())
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def check_model(model: HookedModel) -> None:
    """Refuse states of the model in which relevance would be wrong without anybody noticing."""
    warn_if_untested()
    if torch.is_inference_mode_enabled():
        raise RelevanceError(
            "relevance needs autograd, which torch.inference_mode() forbids; use torch.no_grad() instead, or leave the block"
        )
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise RelevanceError(
            f"the model is in train mode ({training or 'the model itself'}), where dropout makes relevance random; call model.eval()"
        )
    if getattr(model, "_weights_processed", False):
        warnings.warn(
            "this model's weights were processed (process_weights or enable_compatibility_mode): norms are folded and weights "
            "centred, so raw logits are shifted and relevance is that of the processed model",
            stacklevel=4,
        )


def check_forward(model: HookedModel, kwargs: dict[str, Any]) -> None:
    """Refuse forwards on which rules would be wrong without anybody noticing."""
    if kwargs.get("past_key_values") is not None:
        raise RelevanceError("relevance needs the whole sequence: pass all tokens at once instead of past_key_values (a KV cache)")
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(getattr(model, "cfg", None), flag, False):
            raise RelevanceError(
                f"{flag} is on: TransformerLens then runs the raw norm once per head, past any rule on it. Turn it off "
                f"(model.set_{flag}(False)); edges are available without it from analyses.flow_graph"
            )
    if root(model).training:
        raise RelevanceError("the model is in train mode, where dropout would make relevance random; call model.eval() first")
