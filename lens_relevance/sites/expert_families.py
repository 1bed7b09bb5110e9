"""The mixtures of experts that lens_relevance knows: one registered family each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lens_relevance.errors import CoverageError
from lens_relevance.rules import ClampedGate, Expert, Router
from lens_relevance.sites.families import ExpertsFamily, register_experts, softmax_router, unwrapped


def _interleaved_experts(block: Any) -> Callable[[int], Expert]:
    """GPT-OSS: transposed, gate and up in turns, with biases."""
    experts = block.experts
    gate_up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    gate_up_bias, down_bias = experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()
    return lambda e: Expert(
        gate_up[e, :, ::2].T, gate_up[e, :, 1::2].T, down[e].T, gate_up_bias[e, ::2], gate_up_bias[e, 1::2], down_bias[e]
    )


def _router_over_all(block: Any) -> Router:
    """Qwen3-MoE: a softmax over all experts, of which the chosen ones keep their weights, unless the config has these sum to one."""
    return softmax_router(block.gate, over_all=not unwrapped(block.gate).norm_topk_prob)


def _sigmoid_router(block: Any) -> Router:
    """DeepSeek-V3: sigmoids, over the sum of those of the chosen experts, and scaled."""
    router = unwrapped(block.gate)
    if not router.norm_topk_prob:
        raise CoverageError("router weights that do not sum to one (norm_topk_prob=False) are not supported by the rules")
    return softmax_router(router, sigmoid=True, scale=float(router.routed_scaling_factor))


register_experts("MixtralSparseMoeBlock", ExpertsFamily())
for _name in ("Qwen3MoeSparseMoeBlock", "OlmoeSparseMoeBlock", "FlexOlmoSparseMoeBlock"):
    register_experts(_name, ExpertsFamily(router=_router_over_all))
for _name in ("DeepseekV3MoE", "Glm4MoeMoE"):
    register_experts(_name, ExpertsFamily(router=_sigmoid_router))
register_experts(
    "GptOssMLP",
    ExpertsFamily(
        router=lambda block: softmax_router(block.router, bias=unwrapped(block.router).bias.detach()),
        experts=_interleaved_experts,
        gated=lambda block: ClampedGate(float(block.experts.alpha), float(block.experts.limit)),
    ),
)
