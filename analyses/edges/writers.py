"""What each writer adds to the residual stream, and at which HookPoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.edges.transport import push
from analyses.edges.wiring import Layer, Wiring, linear
from lens_relevance.cache import RelevanceCache
from lens_relevance.rules.base import difference
from lens_relevance.ruleset_tables import Table, rule_for
from lens_relevance.sites import Site


@dataclass(frozen=True, eq=False)
class Written:
    """Contributions of writers at one HookPoint.

    Attributes:
        rest: what else was written there, if anything (a bias, what a rule gives to none of the writers).
        point: the HookPoint.
    """

    names: list[str]
    parts: Float[Tensor, "writer batch pos d_model"]
    rest: Float[Tensor, "batch pos d_model"] | None
    point: str


def change(cache: RelevanceCache, name: str) -> Tensor:
    """Activation at a HookPoint, less that of the reference run where there is one."""
    return difference(cache.activations[name], cache.reference_activations.get(name))


def sources(wiring: Wiring, values: RelevanceCache, cache: RelevanceCache, *, table: Table) -> Written:
    """Contributions of `embed` and `pos_embed`, and the HookPoint where they have entered the stream.

    `embed` is what enters the first block less the position embeddings: so it holds any scale a model puts on its embeddings, and BERT's
    token types. Where the embeddings pass a norm, both are parts of its output.
    """
    point, norm = "blocks.0.hook_in", wiring.embed_norm
    entering = change(values, point if norm is None else str(norm.inputs[0].name))
    names, parts = ["embed"], entering.unsqueeze(0)
    if wiring.positions is not None:
        positions = change(values, wiring.positions).expand_as(entering)
        names, parts = ["embed", "pos_embed"], torch.stack([entering - positions, positions])
    return Written(names, *past_norm(norm, parts, point, values, cache, table), point)


def attention_writes(layer: Layer, values: RelevanceCache, cache: RelevanceCache, *, table: Table) -> Written:
    """What the heads of a layer write.

    Args:
        values: the pass that says what is written.
        cache: the pass whose rules hold.
    """
    z, output = change(values, layer.z.output_name), linear(layer.o)
    weight = output.weight.to(z.dtype).unflatten(1, (-1, z.shape[-1]))
    heads, point = torch.einsum("bphe,dhe->hbpd", z, weight), layer.attn_write
    return Written(layer.heads, *_with_rest(heads, layer.attn_post, output.bias, point, values, cache, table), point)


def mlp_writes(layer: Layer, values: RelevanceCache, cache: RelevanceCache, *, table: Table) -> Written:
    """What the MLP of a layer writes; arguments as of `attention_writes`."""
    written, bias, point = change(values, layer.mlp_output), layer.mlp_bias, layer.mlp_write
    if bias is not None and not values.reference_activations:
        written = written - bias.to(written.dtype)
    return Written(layer.mlp_writer, *_with_rest(written.unsqueeze(0), layer.mlp_post, bias, point, values, cache, table), point)


def _with_rest(
    parts: Tensor, post: Site | None, bias: Tensor | None, point: str, values: RelevanceCache, cache: RelevanceCache, table: Table
) -> tuple[Tensor, Tensor | None]:
    """The parts, past a post-norm where there is one, and what else was written."""
    if post is not None:
        return past_norm(post, parts, point, values, cache, table)
    if bias is None or values.reference_activations:  # the same in both runs
        return parts, None
    return parts, bias.to(parts.dtype).expand_as(parts[0])


def past_norm(
    norm: Site | None, parts: Tensor, point: str, values: RelevanceCache, cache: RelevanceCache, table: Table
) -> tuple[Tensor, Tensor | None]:
    """Parts of a norm's output, which is at `point`, under the norm's rule; and what the rule gives none of them."""
    if norm is None:
        return parts, None
    name = str(norm.inputs[0].name)
    parts = push(norm, rule_for(table, norm), cache.activations[name], reference=cache.reference_activations.get(name), parts=parts)
    return parts, change(values, point) - parts.sum(0)
