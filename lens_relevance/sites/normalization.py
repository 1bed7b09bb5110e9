"""Norm components: LayerNorm and RMSNorm, with or without weights, wherever they are mounted."""

from __future__ import annotations

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformer_lens.model_bridge.generalized_components import (
    LayerNormPreBridge,
    NormalizationBridge,
    RMSNormalizationBridge,
    RMSNormPreBridge,
)

from lens_relevance.errors import CoverageError
from lens_relevance.rules import Norm, NormDivide, NormScale, NormWeight, Rule, passes_steps
from lens_relevance.sites.base import InnerPoints, Site


def norm_sites(name: str, component: NormalizationBridge) -> list[Site]:
    """The norm as one operation, and in two steps while something watches its inner HookPoints."""
    original = component.original_component
    if isinstance(original, nn.Identity):
        return []
    norm, mount = _operation(component), name.rsplit(".", 1)[-1]
    if _runs_hf_norm(component) and not _computes(original, norm):
        raise CoverageError(f"{name}: {type(original).__name__} computes neither the LayerNorm nor the RMSNorm that its parameters say")
    if decorative_statistics(component):
        return [Site(name, mount, norm, (component.hook_in,), component.hook_out)]

    hf_norm = _runs_hf_norm(component)

    def read_backward() -> bool:
        return any(point.bwd_hooks for point in inner.points)

    inner = InnerPoints(component.hook_scale, component.hook_normalized, passes_by=lambda: hf_norm and not read_backward())

    def in_steps(rule: Rule) -> bool:
        """Whether the model goes on with hook_scale / hook_normalized, or they are read, and the rule knows the steps.

        Where the bridge runs HF's own norm, these points are a side branch; they join the graph for backward hooks, and for forward hooks
        that edit what they find there.
        """
        if not passes_steps(rule):
            return False
        if inner.passes_by():
            return inner.is_edited
        return hf_norm or inner.have_hooks or read_backward() or any(getattr(point, "is_tapped", False) for point in inner.points)

    def takes_scale() -> bool:
        return not inner.passes_by() or component.hook_scale in inner.edited

    def may_be_in_steps(rule: Rule) -> bool:
        return passes_steps(rule) and inner.passes_by() and inner.have_hooks

    x = component.hook_in
    whole = partial(Site, enabled=lambda rule: not in_steps(rule), considered=lambda rule: inner.passes_by(), inner=inner)
    step = partial(Site, enabled=in_steps, considered=may_be_in_steps, inner=inner)
    return [
        whole(name, mount, norm, (x,), component.hook_out),
        step(f"{name}:scale", mount, NormScale(norm), (x,), component.hook_scale),
        step(f"{name}:divide", mount, NormDivide(norm, takes_scale), (x, component.hook_scale), component.hook_normalized),
        step(f"{name}:weight", mount, NormWeight(norm), (component.hook_normalized,), component.hook_out),
    ]


@torch.no_grad()
def _computes(original: Any, norm: Norm) -> bool:
    """Whether a module does what the operation says, on one vector; asked once per module."""
    if original not in _COMPARED:
        if norm.weight is None or norm.weight.is_meta:  # offloaded: it cannot be run here
            return True
        x = torch.linspace(-1.0, 2.0, norm.weight.numel(), dtype=norm.weight.dtype, device=norm.weight.device).reshape(1, 1, -1)
        _COMPARED[original] = bool(torch.allclose(original(x).float(), norm(x).float(), rtol=2e-2, atol=2e-2))
    return _COMPARED[original]


_COMPARED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def decorative_statistics(component: NormalizationBridge) -> bool:
    """Whether hook_scale and hook_normalized hold those of a LayerNorm although the module is an RMSNorm (T5)."""
    return isinstance(component, RMSNormalizationBridge) and not component.uses_rms_norm


def _runs_hf_norm(component: NormalizationBridge) -> bool:
    return bool(component.use_native_layernorm_autograd or getattr(component.config, "layer_norm_folding", False))


def _operation(component: NormalizationBridge) -> Norm:
    original = component.original_component
    eps: Any = None
    if _runs_hf_norm(component):  # the bridge's own computation takes eps from the config, HF's from the module
        eps = next((e for e in (getattr(original, a, None) for a in ("eps", "variance_epsilon")) if e is not None), None)
    if eps is None:
        eps = getattr(component.config, "eps", 1e-5)
    rms = component.uses_rms_norm or decorative_statistics(component)
    weightless = isinstance(component, LayerNormPreBridge | RMSNormPreBridge)
    weight = None if weightless else getattr(original, "weight", None)
    bias = None if weightless or rms else getattr(original, "bias", None)
    return Norm(weight, bias, float(eps), centred=not rms, offset=1.0 if component.uses_weight_offset else 0.0)
