"""Linear layers: the projections of attention and MLP, the unembedding, and the head of a classifier."""

from __future__ import annotations

from transformer_lens.model_bridge.generalized_components import LinearBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.vision_classifier_head import VisionClassifierHeadBridge
from transformers.pytorch_utils import Conv1D

from lens_relevance.rules import Linear
from lens_relevance.sites.base import Site


def linear_sites(name: str, component: LinearBridge | UnembeddingBridge | VisionClassifierHeadBridge) -> list[Site]:
    """A linear layer as one site. Weights are read as [d_out, d_in] whichever way the module stores them."""
    original = component.original_component
    weight = getattr(original, "weight", None)
    if weight is None or weight.ndim != 2:
        return []
    weight = weight.detach().T if isinstance(original, Conv1D) else weight.detach()
    bias = getattr(original, "bias", None)
    operation = Linear(weight, None if bias is None else bias.detach())
    return [Site(name, name.rsplit(".", 1)[-1], operation, (component.hook_in,), component.hook_out)]
