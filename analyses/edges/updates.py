"""Updates of the residual stream, and how much of each its parts contribute.

An update is one sum: the stream after attention is the stream before it plus what each head brings from each token, plus a bias; the
stream after an MLP is the stream before it plus what the MLP writes. The contribution of a part z to a sum y is its proximity,
max(0, ||y||_1 - ||y - z||_1), over the sum of the proximities of all parts (ALTI, Ferrando et al. 2022, arXiv 2203.04212; Information Flow
Routes, Ferrando and Voita 2024, arXiv 2403.00824). What heads bring from a token is A[t, s] v[s] W_O. A norm that a sum or one of its parts
passes is taken as its linear part at the true scale. That the output bias of attention (with what a norm's bias adds) is a part of its own
and that of an MLP belongs to the MLP is our reading.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.components import Node
from analyses.edges.wiring import Layer, Wiring, linear
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError
from lens_relevance.rules import Norm
from lens_relevance.rules.base import working
from lens_relevance.sites import Site

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # fp64 models may compute their norms in fp32
_HALF_PRECISION_TOLERANCE = 5e-2
_AT_ONCE = 2**23  # numbers of what heads bring that are in memory together


@dataclass(frozen=True, eq=False)
class Brought:
    """What the heads of a layer bring: `pattern[h, t, s] * values[h, s]` from token s to token t.

    Attributes:
        names: of the heads.
        source: the state of the stream that they read.
    """

    names: list[str]
    source: str
    pattern: Float[Tensor, "head pos source"]
    values: Float[Tensor, "head source d_model"]

    def total(self) -> Float[Tensor, "pos d_model"]:
        """From all tokens by all heads."""
        return torch.einsum("hts,hsd->td", self.pattern, self.values)


@dataclass(frozen=True, eq=False)
class Update:
    """One sum, at every position.

    Attributes:
        into: the state of the stream that it is, such as `L3.resid_mid`.
        total: the sum.
        parts: by name, the state before it, `L3.mlp`, `bias` or the embeddings.
        brought: what heads bring, if they take part.
        reads: by a part that is computed from a state of the stream (an MLP), that state.
    """

    into: str
    total: Float[Tensor, "pos d_model"]
    parts: dict[str, Float[Tensor, "pos d_model"]]
    brought: Brought | None
    reads: dict[str, str]

    def contributions(self, positions: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n part"], Float[Tensor, "n head source"]]:
        """Of each part and of each head and token to the sum at these positions; they add up to 1.

        Where no part is near the sum, so that all proximities are 0, all contributions are 0.
        """
        total = self.total[positions]
        own = torch.stack([proximity(part[positions], total) for part in self.parts.values()], 1)
        heads = own.new_zeros(len(positions), 0, len(self.total))
        if self.brought is not None:
            rows = max(1, _AT_ONCE // self.brought.values.numel())
            heads = torch.cat([self._from_tokens(self.brought, chunk) for chunk in positions.split(rows)])
        whole = own.sum(1) + heads.sum((1, 2))
        whole = torch.where(whole == 0, torch.ones_like(whole), whole)
        return own / whole[:, None], heads / whole[:, None, None]

    def _from_tokens(self, brought: Brought, positions: Int[Tensor, " n"]) -> Float[Tensor, "n head source"]:
        vectors = brought.pattern[:, positions].unsqueeze(-1) * brought.values.unsqueeze(1)
        return proximity(vectors, self.total[positions].unsqueeze(1)).transpose(0, 1)


def proximity(part: Float[Tensor, "*lead d"], total: Float[Tensor, "*lead_of_total d"]) -> Float[Tensor, "*lead"]:
    """How near a part is to the sum: max(0, ||total||_1 - ||total - part||_1).

    With leading dimensions [head, n, source] of the part, those of the total are [n, 1].
    """
    return (total.abs().sum(-1) - (total - part).abs().sum(-1)).clamp(min=0)


def state(streams: Wiring, layer: int) -> str:
    """The state of the stream that enters a block; of the number after the last block, what leaves this."""
    last = len(streams.layers) - 1
    return str(Node("resid", layer)) if layer <= last else str(Node("resid_post", last))


def updates(streams: Wiring, cache: RelevanceCache) -> Iterator[Update]:
    """All updates of the first row of a run, from the logits down. The cache holds what `update_points` names.

    Raises:
        CoverageError: the parts of an update that are known do not add up to it.
    """
    for layer in reversed(streams.layers):
        yield from _of_layer(streams, layer, cache)
    yield _embeddings(streams, cache)


def update_points(streams: Wiring) -> list[str]:
    """HookPoints whose activations updates need."""
    names = [streams.final] + ([] if streams.positions is None else [streams.positions])
    norms = [streams.embed_norm]
    for layer in streams.layers:
        names += [f"{layer.path}.hook_in", layer.v.output_name, layer.pattern.output_name, layer.attn_write]
        names += [layer.mlp_write] if layer.has_mlp else []
        norms += [layer.attn_post, layer.attn_after, layer.mlp_after]
    for norm in norms:
        names += [] if norm is None else [str(norm.inputs[0].name), norm.output_name]
    return list(dict.fromkeys(names))


def _of_layer(streams: Wiring, layer: Layer, cache: RelevanceCache) -> Iterator[Update]:
    """The MLP's update, then that of attention; one of both where they read the same stream."""
    before, after = state(streams, layer.index), state(streams, layer.index + 1)
    entering, leaving = _row(cache, f"{layer.path}.hook_in"), _row(cache, _leaving(streams, layer))
    brought, bias = _attention(layer, before, cache)
    written = {name: _row(cache, layer.mlp_write) for name in layer.mlp_writer}
    if not layer.has_mlp or layer.parallel:
        parts = {before: entering, "bias": bias, **written}
        yield _update(after, leaving, parts, brought, dict.fromkeys(written, before), cache, layer.attn_after)
        return
    middle, norm = str(Node("resid_mid", layer.index)), layer.attn_after
    between = entering + _row(cache, layer.attn_write) if norm is None else _row(cache, norm.output_name)
    biases = {} if layer.mlp_after is None else {"bias": torch.zeros_like(bias)}
    yield _update(after, leaving, {middle: between, **biases, **written}, None, dict.fromkeys(written, middle), cache, layer.mlp_after)
    yield _update(middle, between, {before: entering, "bias": bias}, brought, {}, cache, norm)


def _leaving(streams: Wiring, layer: Layer) -> str:
    """HookPoint of the stream that leaves a block."""
    return streams.final if layer is streams.layers[-1] else f"blocks.{layer.index + 1}.hook_in"


def _attention(layer: Layer, source: str, cache: RelevanceCache) -> tuple[Brought, Float[Tensor, "pos d_model"]]:
    """What heads bring, and the bias, past the norm that attention's output passes, if any."""
    pattern, values, output = _row(cache, layer.pattern.output_name), _row(cache, layer.v.output_name), linear(layer.o)
    values = values.repeat_interleave(layer.geometry.group, 1)  # query heads of a group share their values
    weight = output.weight.to(values.dtype).unflatten(1, (-1, values.shape[-1]))
    brought = Brought(layer.heads, source, pattern, torch.einsum("she,dhe->hsd", values, weight))
    bias = torch.zeros_like(brought.values[0]) if output.bias is None else output.bias.to(values.dtype).expand_as(brought.values[0])
    if layer.attn_post is None:
        return brought, bias
    past, (bias,) = _past(layer.attn_post, cache, brought, [bias])
    assert past is not None
    return past, bias + _added(layer.attn_post, bias)


def _embeddings(streams: Wiring, cache: RelevanceCache) -> Update:
    """`embed` holds whatever is not a position embedding, any scale and BERT's token types too."""
    norm, total = streams.embed_norm, _row(cache, "blocks.0.hook_in")
    entering = total if norm is None else _row(cache, str(norm.inputs[0].name))
    parts = {"embed": entering}
    if streams.positions is not None:
        positions = _row(cache, streams.positions).expand_as(entering)
        parts = {"embed": entering - positions, "pos_embed": positions}
    if norm is not None:
        parts["bias"] = torch.zeros_like(entering)
    return _update(state(streams, 0), total, parts, None, {}, cache, norm)


def _update(
    into: str,
    total: Tensor,
    parts: dict[str, Tensor],
    brought: Brought | None,
    reads: dict[str, str],
    cache: RelevanceCache,
    norm: Site | None,
) -> Update:
    """The update, its parts past the norm that the sum passes, if any; checked against the sum."""
    if norm is not None:
        brought, passed = _past(norm, cache, brought, [*parts.values()])
        parts = dict(zip(parts, passed, strict=True))
        parts["bias"] = parts["bias"] + _added(norm, total)
    known = sum(parts.values(), torch.zeros_like(total)) + (0.0 if brought is None else brought.total())
    gap, scale = float((known - total).abs().max()), float(total.abs().max())
    dtype = cache.activations["blocks.0.hook_in"].dtype
    if not gap <= _TOLERANCE.get(dtype, _HALF_PRECISION_TOLERANCE) * scale:
        raise CoverageError(
            f"{into}: the stream is not the sum of what {', '.join(parts)} and heads are known to write ({gap:.1e} off at a scale of "
            f"{scale:.1e}), so contributions cannot be told on this model; flow_graph(kind='relevance') may still be possible"
        )
    return Update(into, total, parts, brought, reads)


def _past(norm: Site, cache: RelevanceCache, brought: Brought | None, parts: list[Tensor]) -> tuple[Brought | None, list[Tensor]]:
    """The linear part of a norm at its true scale: centred, weighted and divided by the scale of all that the norm reads."""
    step = norm.operation
    if not isinstance(step, Norm):
        raise CoverageError(f"contributions know LayerNorm and RMSNorm on the residual stream, and {norm.name} is a {type(step).__name__}")
    scale = step.scale(_row(cache, str(norm.inputs[0].name)))
    if brought is not None:
        values = step.weighted(step.centre(brought.values))
        brought = Brought(brought.names, brought.source, brought.pattern / scale, values)
    return brought, [step.weighted(step.centre(part)) / scale for part in parts]


def _added(norm: Site, like: Tensor) -> Tensor:
    """A norm's own bias."""
    bias = getattr(norm.operation, "bias", None)
    return torch.zeros_like(like) if bias is None else bias.detach().to(like.dtype).expand_as(like)


def _row(cache: RelevanceCache, name: str) -> Tensor:
    """An activation of the first row."""
    return working(cache.activations[name])[0]
