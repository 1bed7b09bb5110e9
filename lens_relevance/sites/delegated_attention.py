"""Attention that TransformerLens runs as a whole: its steps are recomputed from q, k and v as its family says (see families.py).

What such a component shows at its scores and pattern HookPoints is not what the model goes on with. So the steps are recomputed where the
first tensor comes out that the model does go on with (see hooks/recomputation.py): z, or the pattern.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from lens_relevance.errors import CoverageError
from lens_relevance.rules import AttentionGeometry, Mix, Scores, Softmax
from lens_relevance.sites.base import Site
from lens_relevance.sites.families import ATTENTION, AttentionFamily


def delegated_sites(name: str, component: Any) -> list[Site]:
    """Scores, pattern and z of such a component; raises CoverageError for a module whose family is not registered."""
    original = component.original_component
    family = ATTENTION.get(type(original).__name__)
    if family is None:
        raise CoverageError(
            f"{name}: {type(component).__name__} runs {type(original).__name__} as a whole, so its scores and pattern HookPoints are "
            "decorative, and how it computes is not known. Say so with register_attention(name of the class, AttentionFamily(...))"
        )
    module, call = family.called(original), dict[str, Any]()
    names = list(inspect.signature(module.forward).parameters)

    def on_call(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        call.clear()
        call.update(zip(names, args, strict=False))  # ViT passes its mask by position
        call.update(kwargs)

    try:
        geometry = _geometry(component, family, module, call)
    except CoverageError as error:
        raise CoverageError(f"{name}: {error}") from None
    scores, pattern, z = component.hook_attn_scores, component.hook_pattern, component.o.hook_in
    queries_keys, at = (component.q.hook_out, component.k.hook_out), pattern if family.pattern_is_live else z
    return [
        Site(f"{name}:scores", "attn", Scores(geometry), queries_keys, scores, caller=module, on_call=on_call, rebuilt=at),
        Site(f"{name}:pattern", "attn", Softmax(), (scores,), pattern, rebuilt=at),
        Site(f"{name}:z", "attn", Mix(geometry), (pattern, component.v.hook_out), z, rebuilt=None if family.pattern_is_live else z),
    ]


def _geometry(component: Any, family: AttentionFamily, module: Any, call: dict[str, Any]) -> AttentionGeometry:
    rotate, position_bias, n_heads = family.rotate, family.position_bias, family.n_heads(module)
    d_head = component.q.original_component.weight.shape[0] // n_heads

    def added(scores: Tensor) -> Tensor | None:
        bias, mask = None if position_bias is None else position_bias(module, call, scores), family.mask(module, call, scores)
        return mask if bias is None else bias.to(scores.dtype) + (0.0 if mask is None else mask)

    return AttentionGeometry(
        n_heads,
        component.k.original_component.weight.shape[0] // d_head,
        d_head,
        scale=family.scale(module),
        soft_cap=family.soft_cap(module),
        rotate=None if rotate is None else lambda x, sign, _: rotate(module, call, x, sign),
        bias=added,
        adds_bias=position_bias is not None,
    )
