"""Mixture-of-experts components: one site from the MLP's input to its output, around router and experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformer_lens.model_bridge.generalized_components import MoEBridge

from lens_relevance.errors import CoverageError
from lens_relevance.rules import Experts
from lens_relevance.sites.base import Site

# Hugging Face modules known to compute sum of router weight * expert with batched gate_up_proj and down_proj and a softmax router
# (as rules.Experts has it), and whether their router makes the weights of the chosen experts sum to one.
_RENORMALIZES: dict[str, Callable[[Any], bool]] = {
    "MixtralSparseMoeBlock": lambda router: True,
    "Qwen3MoeSparseMoeBlock": lambda router: bool(router.norm_topk_prob),
}


def expert_sites(name: str, component: MoEBridge) -> list[Site]:
    """The mixture of experts as one site; raises CoverageError for a module whose computation is not known."""
    original: Any = component.original_component
    kind = type(original).__name__
    if kind not in _RENORMALIZES:
        raise CoverageError(f"{name}: how {kind} routes to its experts is not known; the rules for mixtures of experts do not apply to it")
    router = getattr(original.gate, "original_component", original.gate)
    operation = Experts(
        original.experts.gate_up_proj.detach(),
        original.experts.down_proj.detach(),
        router.weight.detach(),
        int(router.top_k),
        _RENORMALIZES[kind](router),
        original.experts.act_fn,
    )
    return [Site(name, "mlp", operation, (component.hook_in,), component.hook_out)]
