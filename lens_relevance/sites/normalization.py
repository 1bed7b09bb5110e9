"""Norm components: LayerNorm and RMSNorm, with or without weights, wherever they are mounted."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components import LayerNormPreBridge, NormalizationBridge, RMSNormPreBridge

from lens_relevance.rules import Norm, NormDivide, NormScale, NormWeight
from lens_relevance.sites.base import Site


def norm_sites(name: str, component: NormalizationBridge) -> list[Site]:
    """The norm as one operation, and in two steps while something watches its inner HookPoints."""
    original = component.original_component
    if isinstance(original, nn.Identity):
        return []
    norm, mount = _operation(component), name.rsplit(".", 1)[-1]

    def watched() -> bool:
        """Whether hook_scale / hook_normalized are read, which is where the whole-norm rule would leave no gradient.

        Where the bridge runs HF's own norm, these points are a side branch; they join the graph only for backward hooks.
        """
        inner = (component.hook_scale, component.hook_normalized)
        if any(p.bwd_hooks for p in inner):
            return True
        return not _runs_hf_norm(component) and any(p.fwd_hooks or getattr(p, "is_tapped", False) for p in inner)

    x = component.hook_in
    return [
        Site(name, mount, norm, (x,), component.hook_out, enabled=lambda: not watched()),
        Site(f"{name}:scale", mount, NormScale(norm), (x,), component.hook_scale, enabled=watched),
        Site(f"{name}:divide", mount, NormDivide(norm), (x, component.hook_scale), component.hook_normalized, enabled=watched),
        Site(f"{name}:weight", mount, NormWeight(norm), (component.hook_normalized,), component.hook_out, enabled=watched),
    ]


def _runs_hf_norm(component: NormalizationBridge) -> bool:
    return bool(component.use_native_layernorm_autograd or getattr(component.config, "layer_norm_folding", False))


def _operation(component: NormalizationBridge) -> Norm:
    original = component.original_component
    eps: Any = None
    if _runs_hf_norm(component):  # the bridge's own computation takes eps from the config, HF's from the module
        eps = next((e for e in (getattr(original, a, None) for a in ("eps", "variance_epsilon")) if e is not None), None)
    if eps is None:
        eps = getattr(component.config, "eps", 1e-5)
    rms = component.uses_rms_norm
    weightless = isinstance(component, LayerNormPreBridge | RMSNormPreBridge)
    weight = None if weightless else getattr(original, "weight", None)
    bias = None if weightless or rms else getattr(original, "bias", None)
    return Norm(weight, bias, float(eps), centred=not rms, offset=1.0 if component.uses_weight_offset else 0.0)
