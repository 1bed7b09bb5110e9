"""Mixture-of-experts components: one site from the MLP's input to its output, around router and experts.

How a block mixes is said by its family (see families.py). Shared experts (DeepSeek-V3) belong to the site; the dense layers of such a model
are gated MLPs.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components import MoEBridge

from lens_relevance.errors import CoverageError
from lens_relevance.rules import Experts, GatedActivation
from lens_relevance.sites.base import Site
from lens_relevance.sites.families import EXPERTS


def expert_sites(name: str, component: MoEBridge) -> list[Site]:
    """The mixture of experts as one site; raises CoverageError for a block whose family is not registered."""
    block: Any = component.original_component
    if component.bound_dense:
        return _dense_sites(name, component)
    family = EXPERTS.get(type(block).__name__)
    if family is None:
        raise CoverageError(
            f"{name}: how {type(block).__name__} routes to its experts is not known; known are {', '.join(EXPERTS)}. Say so with "
            "register_experts(name of the class, ExpertsFamily(...))"
        )
    try:
        operation = Experts(
            family.router(block), family.experts(block), family.n_experts(block), gated=family.gated(block), shared=family.shared(block)
        )
    except CoverageError as error:
        raise CoverageError(f"{name}: {error}") from None
    return [Site(name, "mlp", operation, (component.hook_in,), component.hook_out)]


def _dense_sites(name: str, component: Any) -> list[Site]:
    """The layers of such a model that have one gated MLP instead (the first ones of DeepSeek-V3)."""
    gate, into, out = (component._modules.get(part) for part in ("dense_gate", "dense_in", "dense_out"))
    function = getattr(component.original_component, "act_fn", None)
    if gate is None or into is None or out is None or function is None:
        raise CoverageError(f"{name}: the dense layer {type(component.original_component).__name__} is no gated MLP that is known")
    return [Site(name, "mlp", GatedActivation(function), (gate.hook_out, into.hook_out), out.hook_in)]
