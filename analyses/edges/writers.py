"""What each writer adds to the residual stream, and at which HookPoint."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.edges.transport import push
from analyses.edges.wiring import Layer, Wiring, linear
from lens_relevance.cache import RelevanceCache
from lens_relevance.rules.base import difference
from lens_relevance.rulesets import Table, rule_for
from lens_relevance.sites import Site

Written = tuple[list[str], Float[Tensor, "writer batch pos d_model"], str]


def change(cache: RelevanceCache, name: str) -> Tensor:
    """Activation at a HookPoint, less that of the reference run where there is one."""
    return difference(cache.activations[name], cache.reference_activations.get(name))


def sources(wiring: Wiring, cache: RelevanceCache) -> Written:
    """Contributions of `embed` and `pos_embed`, and the HookPoint where they have entered the stream.

    What enters the first block less the position embeddings: so it holds any scale or norm a model puts on its embeddings.
    """
    point = "blocks.0.hook_in"
    entering = change(cache, point)
    if wiring.positions is None:
        return ["embed"], entering.unsqueeze(0), point
    positions = change(cache, wiring.positions).expand_as(entering)
    return ["embed", "pos_embed"], torch.stack([entering - positions, positions]), point


def writes(layer: Layer, cache: RelevanceCache, table: Table) -> Iterator[Written]:
    """For attention, then for the MLP of a layer: writers with their contributions, the last of them `bias`, and their HookPoint."""
    z, output = change(cache, layer.z.output_name), linear(layer.o)
    weight = output.weight.to(z.dtype).unflatten(1, (-1, z.shape[-1]))
    heads = torch.einsum("bphe,dhe->hbpd", z, weight)
    yield [*layer.heads, "bias"], _with_bias(heads, layer.attn_post, layer.attn_write, output.bias, cache, table), layer.attn_write
    if not layer.has_mlp:
        return
    written = change(cache, f"{layer.path}.mlp.hook_out")
    bias = layer.mlp_bias
    if bias is not None and not cache.reference_activations:
        written = written - bias.to(written.dtype)
    written = _with_bias(written.unsqueeze(0), layer.mlp_post, layer.mlp_write, bias, cache, table)
    yield [*layer.mlp_writer, "bias"], written, layer.mlp_write


def _with_bias(parts: Tensor, post: Site | None, write: str, bias: Tensor | None, cache: RelevanceCache, table: Table) -> Tensor:
    """The parts, past a post-norm where there is one, and what else was written: the bias, and what a norm's rule gives nobody."""
    if post is not None:
        name = str(post.inputs[0].name)
        parts = push(post, rule_for(table, post), cache.activations[name], cache.reference_activations.get(name), parts)
        rest = change(cache, write) - parts.sum(0)
    elif bias is None or cache.reference_activations:  # the same in both runs
        rest = torch.zeros_like(parts[0])
    else:
        rest = bias.to(parts.dtype).expand_as(parts[0])
    return torch.cat([parts, rest.unsqueeze(0)])
