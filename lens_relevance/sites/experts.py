"""Mixture-of-experts components: one site from the MLP's input to its output, around router and experts.

A family is one entry of `_FAMILIES`. Shared experts (DeepSeek-V3) belong to the site; the dense layers of such a model are gated MLPs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import MoEBridge

from lens_relevance.errors import CoverageError
from lens_relevance.rules import ClampedGate, Expert, Experts, GatedActivation, Router
from lens_relevance.sites.base import Site


@dataclass(frozen=True)
class _Family:
    """How one Hugging Face module mixes its experts: batched weights, and a router that gives (scores, weights, indices of the chosen).

    router: its attribute's name; experts: from the experts' module to a function that gives the e-th; gated: their activation;
    options: of `Router`, from the router's module; refused: why a setting of it is not known, or "".
    """

    experts: Callable[[Any], Callable[[int], Expert]]
    router: str = "gate"
    gated: Callable[[Any], GatedActivation] = lambda experts: GatedActivation(experts.act_fn)
    options: Callable[[Any], dict[str, Any]] = lambda router: {}
    refused: Callable[[Any], str] = lambda router: ""


def _stacked(experts: Any) -> Callable[[int], Expert]:
    """gate_up_proj [expert, 2 d_expert, d_model], gate above up; down_proj [expert, d_model, d_expert]."""
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    d_expert = gate_up.shape[1] // 2
    return lambda e: Expert(gate_up[e, :d_expert], gate_up[e, d_expert:], down[e])


def _interleaved(experts: Any) -> Callable[[int], Expert]:
    """Transposed, gate and up in turns, with biases (GPT-OSS)."""
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    gate_up_bias, down_bias = experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()
    return lambda e: Expert(
        gate_up[e, :, ::2].T, gate_up[e, :, 1::2].T, down[e].T, gate_up_bias[e, ::2], gate_up_bias[e, 1::2], down_bias[e]
    )


_FAMILIES: dict[str, _Family] = {
    "MixtralSparseMoeBlock": _Family(_stacked),
    **dict.fromkeys(
        ("Qwen3MoeSparseMoeBlock", "OlmoeSparseMoeBlock", "FlexOlmoSparseMoeBlock"),
        _Family(_stacked, options=lambda router: {"over_all": not router.norm_topk_prob}),
    ),
    "GptOssMLP": _Family(
        _interleaved,
        router="router",
        gated=lambda experts: ClampedGate(float(experts.alpha), float(experts.limit)),
        options=lambda router: {"bias": router.bias.detach()},
    ),
    **dict.fromkeys(
        ("DeepseekV3MoE", "Glm4MoeMoE"),
        _Family(
            _stacked,
            options=lambda router: {"sigmoid": True, "scale": float(router.routed_scaling_factor)},
            refused=lambda router: "" if router.norm_topk_prob else "router weights that do not sum to one (norm_topk_prob=False)",
        ),
    ),
}


def expert_sites(name: str, component: MoEBridge) -> list[Site]:
    """The mixture of experts as one site; raises CoverageError for a module whose computation is not known."""
    original: Any = component.original_component
    if component.bound_dense:
        return _dense_sites(name, component)
    family = _FAMILIES.get(type(original).__name__)
    if family is None:
        raise CoverageError(
            f"{name}: how {type(original).__name__} routes to its experts is not known; known are {', '.join(_FAMILIES)}, and a new one is "
            "an entry in lens_relevance/sites/experts.py"
        )
    module = getattr(original, family.router)
    router = getattr(module, "original_component", module)
    if reason := family.refused(router):
        raise CoverageError(f"{name}: {reason} are not supported by the rules for mixtures of experts")

    @torch.no_grad()
    def choose(x: Tensor) -> Tensor:
        return router(x)[2]

    operation = Experts(
        Router(router.weight.detach(), choose, **family.options(router)),
        family.experts(original.experts),
        int(original.experts.num_experts),
        family.gated(original.experts),
        _shared(getattr(original, "shared_experts", None)),
    )
    return [Site(name, "mlp", operation, (component.hook_in,), component.hook_out)]


def _shared(module: Any) -> Expert | None:
    """An expert that every token passes, with weight one."""
    if module is None:
        return None
    module = getattr(module, "original_component", module)
    parts = (getattr(module, part) for part in ("gate_proj", "up_proj", "down_proj"))
    return Expert(*(getattr(part, "original_component", part).weight.detach() for part in parts))


def _dense_sites(name: str, component: Any) -> list[Site]:
    """The layers of such a model that have one gated MLP instead (the first ones of DeepSeek-V3)."""
    gate, into, out = (component._modules.get(part) for part in ("dense_gate", "dense_in", "dense_out"))
    function = getattr(component.original_component, "act_fn", None)
    if gate is None or into is None or out is None or function is None:
        raise CoverageError(f"{name}: the dense layer {type(component.original_component).__name__} is no gated MLP that is known")
    return [Site(name, "mlp", GatedActivation(function), (gate.hook_out, into.hook_out), out.hook_in)]
