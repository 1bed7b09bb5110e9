"""Families from outside: how an attention module or a mixture of experts computes, registered by the name of its Hugging Face class.

    register_attention("MyAttention", AttentionFamily(scale=lambda module: module.scaling))
    register_experts("MySparseMoeBlock", ExpertsFamily(router=lambda block: softmax_router(block.gate)))

What is registered holds for every model of that class from then on. The families that lens_relevance knows are registered in the same
way, in `attention_families.py` and `expert_families.py`, which are the examples to start from. A description is checked: what is recomputed
from it is compared with what the module returns, and a difference is a LivenessError. `coverage(model)` shows how far the two lie apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lens_relevance.errors import RelevanceError
from lens_relevance.rules import Expert, GatedActivation, Router

Call = Mapping[str, Any]
F = TypeVar("F")


def argument_mask(
    module: Any, call: Call, scores: Float[Tensor, "*lead head query key"], *, argument: str = "attention_mask"
) -> Float[Tensor, "*_scores"] | None:
    """The mask of a module's last call, as what is added to its scores.

    Args:
        module: the module; where it was called without a mask and says `is_causal`, each query sees the keys up to its own position.
        call: arguments of the last call by name.
        scores: [..., head, query, key].
        argument: name of the mask, boolean (True where a key is seen) or additive.

    Returns:
        0 where a key is seen and -inf elsewhere, or another bias that the mask holds; None where nothing is hidden.
    """
    given = call.get(argument)
    if given is None and getattr(module, "is_causal", False):
        given = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if given is None:
        return None
    if given.dtype == torch.bool:
        return torch.zeros_like(given, dtype=scores.dtype).masked_fill(~given, float("-inf"))
    return given.to(scores.dtype).masked_fill(given <= torch.finfo(given.dtype).min / 2, float("-inf"))


@dataclass(frozen=True)
class AttentionFamily:
    """How an attention module computes, where TransformerLens runs it as a whole (its component class `AttentionBridge`).

    While rules are attached, the three steps are recomputed from what passes the HookPoints of q, k and v:

        scores  = soft_cap(scale * rotate(q) rotate(k)^T) + position_bias + mask
        pattern = softmax(scores)
        z       = pattern v

    Every field is a function of the module that is called with the mask (see `called`). `call` holds the arguments of its last call by
    name. A field may raise CoverageError for a setting of the module that is not supported.

    Attributes:
        scale: the factor on the product of queries and keys. By default `module.scaling`.
        n_heads: the number of query heads. By default `module.num_heads`. The size of a head and the number of key-value heads follow from
            the weights of q and k.
        soft_cap: c in c tanh(scores / c), or None. By default None.
        rotate: (module, call, x, sign) -> x of the same shape [batch, head, pos, d_head]: queries or keys turned by their positions; with
            sign -1 the transpose of that, for coefficients. None, the default: no rotation.
        position_bias: (module, call, scores) -> what is added to the scores [batch, head, query, key] besides the mask, or None (T5). It
            keeps a share of the relevance, which the conservation account shows. None, the default: there is no such bias.
        mask: (module, call, scores) -> 0 where a key is seen, -inf where it is hidden; None where nothing is. By default the argument
            `attention_mask`, and without one `is_causal`.
        called: from the module that TransformerLens wraps to the one that is called with the mask. By default the same.
        pattern_is_live: whether the model goes on with what passes the pattern's HookPoint, so that only scores and pattern are recomputed.
    """

    scale: Callable[[Any], float] = lambda module: float(module.scaling)
    n_heads: Callable[[Any], int] = lambda module: int(module.num_heads)
    soft_cap: Callable[[Any], float | None] = lambda module: None
    rotate: Callable[[Any, Call, Float[Tensor, "batch head pos d_head"], int], Float[Tensor, "batch head pos d_head"]] | None = None
    position_bias: Callable[[Any, Call, Float[Tensor, "batch head query key"]], Float[Tensor, "*_scores"] | None] | None = None
    mask: Callable[[Any, Call, Float[Tensor, "batch head query key"]], Float[Tensor, "*_scores"] | None] = argument_mask
    called: Callable[[Any], nn.Module] = lambda module: module
    pattern_is_live: bool = False


def unwrapped(module: Any) -> Any:
    """A module as Hugging Face made it: TransformerLens puts components of its own around some of a block's children."""
    return getattr(module, "original_component", module)


def softmax_router(module: Any, **settings: Any) -> Router:
    """A router whose module returns (scores, weights, indices of the chosen experts), as Hugging Face's do.

    Args:
        module: the router; `module.weight` is [expert, d_model].
        settings: of `Router`: bias, over_all, sigmoid, scale.
    """
    module = unwrapped(module)

    @torch.no_grad()
    def choose(x: Tensor) -> Tensor:
        return module(x)[2]

    return Router(module.weight.detach(), choose, **settings)


def stacked_experts(block: Any) -> Callable[[int], Expert]:
    """`block.experts` with gate_up_proj [expert, 2 d_expert, d_model], gate above up, and down_proj [expert, d_model, d_expert]."""
    gate_up, down = block.experts.gate_up_proj.detach(), block.experts.down_proj.detach()
    d_expert = gate_up.shape[1] // 2
    return lambda e: Expert(gate_up[e, :d_expert], gate_up[e, d_expert:], down[e])


def shared_expert(block: Any) -> Expert | None:
    """`block.shared_experts`, a gated MLP (gate_proj, up_proj, down_proj) that every token passes with weight one; None without one."""
    module = unwrapped(getattr(block, "shared_experts", None))
    if module is None:
        return None
    return Expert(*(unwrapped(getattr(module, part)).weight.detach() for part in ("gate_proj", "up_proj", "down_proj")))


@dataclass(frozen=True)
class ExpertsFamily:
    """How a mixture of experts computes:

        y = sum over the chosen experts of router weight * expert(x), plus shared(x)
        expert(x) = down (f(gate x) * (up x))

    Every field is a function of the block that holds router and experts. Its children may be components of TransformerLens: `unwrapped`
    gives what they wrap. A field may raise CoverageError for a setting of the block that is not supported.

    Attributes:
        router: the weights of the router's scores, how it chooses and how it weighs. By default `softmax_router(block.gate)`.
        experts: a function from an expert's index to its weights, taken when needed. By default `stacked_experts`.
        n_experts: how many there are. By default `block.experts.num_experts`.
        gated: the experts' activation f. By default `block.experts.act_fn`.
        shared: an expert that every token passes, or None. By default `block.shared_experts`, where the block has one.
    """

    router: Callable[[Any], Router] = lambda block: softmax_router(block.gate)
    experts: Callable[[Any], Callable[[int], Expert]] = stacked_experts
    n_experts: Callable[[Any], int] = lambda block: int(block.experts.num_experts)
    gated: Callable[[Any], GatedActivation] = lambda block: GatedActivation(block.experts.act_fn)
    shared: Callable[[Any], Expert | None] = shared_expert


ATTENTION: dict[str, AttentionFamily] = {}
EXPERTS: dict[str, ExpertsFamily] = {}


def register_attention(hf_class_name: str, family: AttentionFamily, *, replace: bool = False) -> None:
    """Say how an attention module computes.

    Args:
        hf_class_name: name of the module's class, as in `type(module).__name__`.
        family: how it computes.
        replace: take the place of a family that is registered under this name.

    Raises:
        RelevanceError: the name is registered already and `replace` is False.
    """
    _register(ATTENTION, hf_class_name, family, replace)


def register_experts(hf_class_name: str, family: ExpertsFamily, *, replace: bool = False) -> None:
    """Say how a mixture of experts computes.

    Args:
        hf_class_name: name of the block's class, as in `type(block).__name__`.
        family: how it computes.
        replace: take the place of a family that is registered under this name.

    Raises:
        RelevanceError: the name is registered already and `replace` is False.
    """
    _register(EXPERTS, hf_class_name, family, replace)


def _register(registry: dict[str, F], name: str, family: F, replace: bool) -> None:
    if name in registry and not replace:
        raise RelevanceError(f"a family named {name!r} is registered already; replace=True puts this one in its place")
    registry[name] = family
