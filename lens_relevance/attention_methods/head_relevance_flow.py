"""Relevance flow of each head: from which source tokens, through its values or its keys, its relevance comes.

The picture to show for a head: unlike its pattern, it says what the attended tokens brought for the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lens_relevance.attention_methods.key_flow import key_flow, key_points, rotary_constants
from lens_relevance.attention_methods.run import check_patterns, token_sets
from lens_relevance.cache import RelevanceCache
from lens_relevance.defaults import with_defaults
from lens_relevance.engine import propagate
from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.prompt import Inputs, read_inputs
from lens_relevance.inputs.targets import AnyTarget
from lens_relevance.rules.base import share, working
from lens_relevance.ruleset_tables import Table
from lens_relevance.sites import anatomy


@left_as_found
def head_flow(
    model: HookedModel,
    inputs: Inputs,
    target: AnyTarget | None = None,
    *,
    rules: str | Table | None = None,
    path: Literal["value", "key"] = "value",
    layers: Sequence[int] | None = None,
    reference: Any = None,
    attention_mask: Shaped[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "batch layer head query key"]:
    """F_h[t, s]: relevance that head h at token t takes from token s, in units of the target.

    With path "value" it is A[t, s] v[s] . g_z[t]; a row sums to the head's relevance at t, `propagate(...).heads()`. With path "key" it is
    k[s] . (what query t adds to the coefficient at the keys); a column sums to the key relevance of s in this head, and over the heads that
    share a key-value head to the relevance at `k.hook_out` (`hook_rot_k` where the model has it). With a reference the terms are
    (A[t, s] v[s] - A'[t, s] v'[s]) . g_z[t], and k[s] - k'[s] stands in place of k[s].

    Source: ours: the terms of the sums that the rules for z, and for scores, distribute.

    Args:
        path: Through the values, or through the keys.
        layers: Which, in this order; all by default.
        model, inputs, target, rules, reference, attention_mask: As for `propagate`; of references one.

    Returns:
        F[example, i, h, t, s] for the i-th of `layers`.

    Raises:
        CoverageError: A model without live patterns.
        RelevanceError: A layer out of range, several references, or bad input.
    """
    body = anatomy(model)
    check_patterns(body, model)
    if len(token_sets(body)) > 1:
        raise RelevanceError(f"head_flow knows models with one token set; this one has {' and '.join(token_sets(body))}")
    chosen = list(range(body.n_layers)) if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < body.n_layers:
            raise RelevanceError(f"layer {layer} is out of range: the model has {body.n_layers} layers, 0 to {body.n_layers - 1}")
    if path not in ("value", "key"):
        raise RelevanceError(f"unknown path {path!r}; choose 'value' or 'key'")
    if getattr(reference, "n", 1) > 1:
        raise RelevanceError(f"a flow is that of one pair of runs, but {reference} holds {reference.n}; use mean_embedding() or a prompt")

    rules, reference = with_defaults(model, read_inputs(model, inputs, attention_mask), rules, reference=reference)
    if path == "key":
        with rotary_constants(model, body, chosen) as constants:
            cache = propagate(
                model,
                inputs,
                target,
                rules=rules,
                names_filter=key_points(body, chosen),
                reference=reference,
                attention_mask=attention_mask,
            )
        return torch.stack([key_flow(body, cache, constants, layer=layer, rules=rules) for layer in chosen], 1)
    names = [f"blocks.{layer}.attn.{point}" for layer in chosen for point in ("hook_pattern", "v.hook_out", "hook_z")]
    cache = propagate(model, inputs, target, rules=rules, names_filter=names, reference=reference, attention_mask=attention_mask)
    return torch.stack([_of_layer(cache, layer) for layer in chosen], 1)


def value_flow(
    pattern: Float[Tensor, "batch head query key"],
    v: Float[Tensor, "batch key kv_head d_head"],
    g_z: Float[Tensor, "batch query head d_head"],
) -> Float[Tensor, "batch head query key"]:
    """A[t, s] v[s] . g_z[t] for one run; heads share key-value heads in equal groups."""
    values = working(v).repeat_interleave(pattern.shape[1] // v.shape[2], 2)
    return share(pattern, torch.einsum("bqhd,bkhd->bhqk", working(g_z), values))


def _of_layer(cache: RelevanceCache, layer: int) -> Float[Tensor, "batch head query key"]:
    names = [cache.canonical(f"blocks.{layer}.attn.{point}") for point in ("hook_pattern", "v.hook_out", "hook_z")]
    pattern, v, z = names
    real = cache.mask.bool()
    open_ = real[:, None, :, None] & real[:, None, None, :]

    def one(activations: dict[str, Tensor]) -> Tensor:
        values = torch.where(real[:, :, None, None], activations[v], torch.zeros_like(activations[v]))
        flow = value_flow(activations[pattern], values, cache.coefficients[z])
        return torch.where(open_, flow, torch.zeros_like(flow))

    flow = one(cache.activations)
    return flow - one(cache.reference_activations) if cache.reference_activations else flow
