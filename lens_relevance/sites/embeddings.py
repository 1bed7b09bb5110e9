"""Where a model turns token ids into vectors."""

from __future__ import annotations

from torch import nn

from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.sites.token_sets import DECODER


def token_embedding(model: HookedModel, stack: str) -> nn.Embedding | None:
    """The token embedding of a stack of a TransformerBridge; None where there is none, or the model is no bridge."""
    component = getattr(model, "decoder_embed" if stack == DECODER and hasattr(model, "decoder_embed") else "embed", None)
    original = getattr(component, "original_component", None)
    return original if isinstance(original, nn.Embedding) else None


def image_token(model: HookedModel) -> int | None:
    """The id whose places an image's patches take, where a model reads images among its tokens (LLaVA)."""
    found = getattr(getattr(root(model), "config", None), "image_token_id", None)
    return None if found is None else int(found)
