"""Direct logits: what a vector written to the residual stream adds to the logits by itself, past all later layers."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.edges.transport import push
from lens_relevance import CoverageError
from lens_relevance.rules import Linear, LNRule
from lens_relevance.rules.base import working
from lens_relevance.sites import Site, anatomy


class DirectLogits:
    """The straight way from what a head or an MLP writes to the logits.

    The norms on that way (the final one, and one after the sublayer: Gemma 2, OLMo 2) are linear maps here: their standard deviation is a
    constant, that of the run in which the vector was written; centring and weights act. Biases stay out, and so does a final soft-cap.
    Logits have their mean over the vocabulary subtracted, as only differences between tokens matter.

    Args:
        component: `attn` or `mlp`, whose output is the vector.

    Raises:
        CoverageError: a model whose output head is not linear.
    """

    def __init__(self, model: TransformerBridge, layer: int, component: str) -> None:
        sites = {site.name: site for site in anatomy(model).sites}
        if "unembed" not in sites or "mlm_head:activation" in sites:
            raise CoverageError("this model has no straight way from the residual stream to the logits: its output head is not linear")
        post = f"blocks.{layer}.{'ln1_post' if component == 'attn' else 'ln2_post'}"
        # A site without HookPoint of its own for the norm (no norm at all) is simply not on the way.
        self._way: list[Site] = [sites[name] for name in (post, "ln_final") if name in sites]
        unembed = sites["unembed"].operation
        assert isinstance(unembed, Linear)
        self._unembed = unembed.weight

    @property
    def norms(self) -> list[str]:
        """Names of the HookPoints at which the run's norm inputs are needed."""
        return [str(site.inputs[0].name) for site in self._way]

    @torch.no_grad()
    def __call__(
        self, written: Float[Tensor, "n d_model"], norm_inputs: dict[str, Float[Tensor, "n d_model"]]
    ) -> Float[Tensor, "n d_vocab"]:
        """Direct logits of n vectors; norm_inputs: [n, d_model] at each of `norms`, at the position where the vector was written."""
        parts = working(written)
        for site in self._way:
            parts = push(site, LNRule(), working(norm_inputs[str(site.inputs[0].name)]), reference=None, parts=parts)
        logits = parts @ self._unembed.to(parts).T
        return logits - logits.mean(-1, keepdim=True)


def head_output_weight(model: TransformerBridge, layer: int, head: int, *, n_heads: int) -> Float[Tensor, "d_model d_head"]:
    """W_O of one head (transposed), whatever way the model stores it."""
    return _weight(model, f"blocks.{layer}.attn.o").unflatten(1, (n_heads, -1))[:, head]


def neuron_output_weight(model: TransformerBridge, layer: int) -> Float[Tensor, "d_model d_mlp"]:
    """W_out of a layer (transposed): a column is what one unit of a neuron's activation writes."""
    return _weight(model, f"blocks.{layer}.mlp.out")


def _weight(model: TransformerBridge, name: str) -> Float[Tensor, "d_out d_in"]:
    operation = next((site.operation for site in anatomy(model).sites if site.name == name), None)
    if not isinstance(operation, Linear):
        raise CoverageError(f"{name} is not a linear layer of its own on this model, so what a part of it writes cannot be told")
    return operation.weight
