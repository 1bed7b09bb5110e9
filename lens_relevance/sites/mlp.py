"""MLP components: the activation between `in` and `out`, or the gated activation between `gate`, `in` and `out`."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import GatedMLPBridge, MLPBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from lens_relevance.errors import CoverageError
from lens_relevance.rules import Activation, GatedActivation
from lens_relevance.sites.base import Site

_FUNCTION_NAMES = ("act", "act_fn", "activation_fn", "activation_function", "activation", "gelu_impl", "intermediate_act_fn")


def mlp_sites(name: str, component: MLPBridge) -> list[Site]:
    """The activation of an MLP (one site)."""
    inner = {child: getattr(component, child, None) for child in ("gate", "in", "input", "out", "ln")}
    into = inner["in"] if inner["in"] is not None else inner["input"]
    if into is None or inner["out"] is None:
        raise CoverageError(f"{name}: no 'in' and 'out' linear layers found in {type(component).__name__}")
    function, label = _activation_function(name, component)
    if inner["gate"] is not None:
        gated = GatedActivation(function, label)
        return [Site(name, "mlp", gated, (inner["gate"].hook_out, into.hook_out), inner["out"].hook_in)]
    after = inner["out"].hook_in if inner["ln"] is None else inner["ln"].hook_in
    return [Site(name, "mlp", Activation(function, label), (into.hook_out,), after)]


def fed_by(name: str, component: GeneralizedComponent) -> dict[str, HookPoint]:
    """By linear layer of an MLP: the HookPoint that holds its input where its own does not fire, as TransformerLens computes gated MLPs
    with processed weights by itself."""
    if isinstance(component, GatedMLPBridge) and getattr(component, "_use_processed_weights", False):
        return {f"{name}.gate": component.hook_in, f"{name}.in": component.hook_in}
    return {}


def _activation_function(name: str, component: MLPBridge) -> tuple[Callable[[Tensor], Tensor], str]:
    original = component.original_component
    original = getattr(
        original, "intermediate", original
    )  # BERT's MLP has no module of its own: the activation sits beside the first layer
    for attribute in _FUNCTION_NAMES:
        function = getattr(original, attribute, None)
        if callable(function):
            if not _is_elementwise(function):
                raise CoverageError(f"{name}: its activation mixes features (SoLU does), so the element-wise rules do not apply to it")
            return function, getattr(function, "__name__", type(function).__name__)
    raise CoverageError(f"{name}: the activation function was not found on {type(original).__name__} (tried {', '.join(_FUNCTION_NAMES)})")


def _is_elementwise(function: Callable[[Tensor], Tensor]) -> bool:
    """A probe with three values, together and one by one; once for each function, as every anatomy asks."""
    if function not in _ELEMENTWISE:
        with torch.no_grad():
            x = torch.tensor([[-1.5, 0.5, 2.0]])
            _ELEMENTWISE[function] = torch.allclose(function(x), torch.cat([function(x[:, i : i + 1]) for i in range(3)], -1))
    return _ELEMENTWISE[function]


_ELEMENTWISE: WeakKeyDictionary[Callable[[Tensor], Tensor], bool] = WeakKeyDictionary()
