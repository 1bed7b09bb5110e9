"""What lies between the last block and the logits besides norm and unembedding.

A final soft-cap (Gemma 2, native models) and a bias on the logits (BART) lie outside all HookPoints; a masked-language-model head and a
pooler (BERT) have activations of their own.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import BertPoolerBridge

from lens_relevance.errors import CoverageError
from lens_relevance.rules import Activation, SoftCap
from lens_relevance.rules.linear import AddedBias
from lens_relevance.sites.base import Site


def output_sites(model: TransformerBridge) -> list[Site]:
    """The soft-cap, from `unembed.hook_out` to what the model returns, and the head's activation, where a model has them."""
    original, sites = model.original_model, []
    cap = getattr(getattr(original, "config", None), "final_logit_softcapping", None) or getattr(original, "output_logits_soft_cap", None)
    if cap and cap > 0:
        sites.append(Site("logits", "logits", SoftCap(float(cap)), (model.unembed.hook_out,), None))
    bias = getattr(original, "final_logits_bias", None)  # BART and its like, where the encoder-decoder's head adds it
    if isinstance(bias, Tensor) and not cap:
        sites.append(Site("logits", "logits", AddedBias(bias.reshape(-1)), (model.unembed.hook_out,), None))
    if "mlm_head" in model._modules:
        transform = getattr(getattr(getattr(original, "cls", None), "predictions", None), "transform", None)
        function = getattr(transform, "transform_act_fn", None)
        if type(getattr(original, "lm_head", None)).__name__ == "RobertaLMHead":
            function = functional.gelu  # written into the head's forward
        if function is None:
            raise CoverageError(f"mlm_head: the activation of {type(original).__name__}'s head was not found")
        sites.append(Site("mlm_head:activation", "mlm_head", Activation(function), (model.mlm_head.hook_out,), model.ln_final.hook_in))
    return sites


def pooler_sites(name: str, component: BertPoolerBridge) -> list[Site]:
    """The activation of a pooler, which reads the first position: from its linear layer to what it gives to the classifier."""
    function, dense = getattr(component.original_component, "activation", None), getattr(component, "dense", None)
    if function is None or dense is None:
        raise CoverageError(f"{name}: the linear layer and the activation of {type(component.original_component).__name__} were not found")
    return [Site(f"{name}:activation", "pooler", Activation(function), (dense.hook_out,), component.hook_out)]
