"""Dictionaries in the residual stream: where their features, skip connections and errors stand, what these read and what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.components import ERROR, FEATURES, SKIP, Node
from analyses.edges.transport import pull
from analyses.edges.wiring import Layer, Wiring
from analyses.edges.writers import Written, change, past_norm
from lens_relevance.cache import RelevanceCache
from lens_relevance.dictionaries import Dictionary
from lens_relevance.dictionaries.active import ActiveFeatures, active_features
from lens_relevance.dictionaries.placement import place_on
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.hooks.placed_dictionary import as_rows, linear_part
from lens_relevance.rules import Rule
from lens_relevance.rules.base import working
from lens_relevance.ruleset_tables import Table, rule_for
from lens_relevance.sites import Site
from lens_relevance.sites.base import block_of

Stage = Literal["in", "attn", "mlp", "after_mlp", "out"]
"""Where in a block a dictionary writes: the stream before attention, attention's output, the MLP's place or output, the stream after."""


@dataclass(frozen=True, eq=False)
class Standing:
    """A dictionary in its place.

    Attributes:
        layer: The block that it first writes in.
        stage: Where in that block.
        norm: What its features read through, if they read what a norm gives.
        rule: Of its activation.
        points_out: HookPoints that it writes to, and of each the block and the norm that what is written passes, if any.
        chosen: Features that are nodes of their own.
    """

    dictionary: Dictionary
    layer: int
    stage: Stage
    point_in: str
    norm: Site | None
    rule: Rule
    points_out: tuple[tuple[str, int, Site | None], ...]
    chosen: tuple[int, ...] = ()

    @property
    def readers(self) -> list[str]:
        """The chosen features, all others together, and what goes past the features."""
        names = [str(Node(FEATURES, self.layer, feature=feature)) for feature in self.chosen] + [str(Node(FEATURES, self.layer))]
        goes_past = self.dictionary.skip is not None or self.dictionary.normalization == "layer_norm"
        return names + ([str(Node(SKIP, self.layer))] if goes_past else [])

    @property
    def writers(self) -> list[str]:
        """The same, and what the dictionary misses."""
        return [*self.readers, str(Node(ERROR, self.layer))]

    @property
    def points(self) -> list[str]:
        """HookPoints whose activations and coefficients are needed."""
        inner = [name for _, _, norm in self.points_out if norm is not None for name in (str(norm.inputs[0].name), norm.output_name)]
        return [self.point_in, *(point for point, _, _ in self.points_out), *inner]


def standing(wiring: Wiring, dictionaries: Sequence[Dictionary], table: Table) -> tuple[Standing, ...]:
    """Dictionaries in their places.

    Raises:
        RelevanceError: Two of them write first in one layer, so that their features' names would be the same.
        CoverageError: One reads or writes where the edges of its features cannot be told apart.
    """
    placed = place_on(wiring.body, dictionaries, table, path="features").placed
    found = tuple(_standing(wiring, one.dictionary, one.point_in, one.points_out, one.rule) for one in placed)
    layers = [one.layer for one in found]
    if twice := [layer for layer in layers if layers.count(layer) > 1]:
        raise RelevanceError(
            f"two dictionaries write in layer {twice[0]}, and features are named by layer (L{twice[0]}F0): give one of them"
        )
    return found


def _standing(wiring: Wiring, dictionary: Dictionary, point_in: str, points_out: tuple[str, ...], rule: Rule) -> Standing:
    index = block_of(points_out[0])[1]
    if index is not None and points_out == (point_in,):
        layer = wiring.layers[index]
        stages: dict[str, Stage] = {f"{layer.path}.hook_in": "in", f"{layer.path}.hook_out": "out"}
        stages.update((point, "attn") for point in _attention_output(layer))
        stages.update((point, "after_mlp") for point in _mlp_output(layer))
        if point_in in stages:
            return Standing(dictionary, index, stages[point_in], point_in, None, rule, ((point_in, index, None),))
    elif index is not None and (reading := _reading(wiring.layers[index], point_in)) is not None:
        written = [_writing(wiring.layers, point) for point in points_out]
        if all(one is not None for one in written):
            return Standing(dictionary, index, "mlp", point_in, reading[0], rule, tuple(one for one in written if one is not None))
    raise CoverageError(
        f"a graph cannot tell the edges of {dictionary!r} apart: it takes transcoders in the MLP's place (from ln2.hook_out or the stream "
        "before it to hook_mlp_out), and autoencoders of hook_resid_pre, hook_resid_post, hook_attn_out and hook_mlp_out"
    )


def _reading(layer: Layer, point: str) -> tuple[Site | None] | None:
    """The norm through which a transcoder reads the stream; None where it reads something else."""
    if not layer.has_mlp:
        return None
    if point in (f"{layer.path}.mlp.hook_in", None if layer.mlp_norm is None else layer.mlp_norm.output_name):
        return (layer.mlp_norm,)
    return (None,) if point == layer.mlp_input else None


def _writing(layers: Sequence[Layer], point: str) -> tuple[str, int, Site | None] | None:
    """The block in which a transcoder writes and the norm that this passes; None where it is no MLP's output."""
    index = block_of(point)[1]
    layer = None if index is None else layers[index]
    if layer is None or index is None:
        return None
    if point in _mlp_output(layer):
        return point, index, None
    before_norm = layer.mlp_post is not None and point in (layer.mlp_output, f"{layer.path}.mlp.hook_out")
    return (point, index, layer.mlp_post) if before_norm else None


def _attention_output(layer: Layer) -> list[str]:
    """HookPoints of what attention adds to the stream."""
    return [layer.attn_write] + ([f"{layer.path}.attn.hook_out"] if layer.attn_post is None else [])


def _mlp_output(layer: Layer) -> list[str]:
    """HookPoints of what the MLP adds to the stream."""
    if not layer.has_mlp:
        return []
    return [layer.mlp_write] + ([f"{layer.path}.mlp.hook_out"] if layer.mlp_post is None else [])


def strongest_features(found: Sequence[Standing], caches: Sequence[RelevanceCache], n: int) -> list[tuple[int, ...]]:
    """Of each dictionary those of its features that are among the n of largest relevance at a position, of all dictionaries."""
    if n < 0:
        raise RelevanceError(f"n_features counts features that become nodes, got {n}")
    sizes = []
    for one in found:
        relevance = torch.stack([cache.features(one.points_out[0][0]) for cache in caches]).to_dense().mean(0)
        sizes.append(relevance.abs().amax((0, 1)).double().cpu())
    ends = torch.tensor([0, *(len(size) for size in sizes)]).cumsum(0)
    top = torch.cat(sizes).topk(min(n, int(ends[-1])))
    best = top.indices[top.values > 0].sort().values
    return [tuple((best[(best >= low) & (best < high)] - low).tolist()) for low, high in zip(ends, ends[1:], strict=False)]


@dataclass(frozen=True, eq=False)
class Units:
    """What the features, skip connection and error of one dictionary read and write in one pass.

    Attributes:
        reads: Coefficients of its readers at the stream, or at what is written where it stands.
        written: By HookPoint, what it writes there past a norm, less the error and the bias.
        bias: What the decoder's bias adds to the first of its HookPoints, before a norm.
        scores: Relevance of each reader at what it writes.
        sinks: Of it, what stays at biases and at the activation.
        activation: Of each chosen feature, its value in the run.
    """

    standing: Standing
    reads: Float[Tensor, "reader batch pos d_in"]
    written: dict[str, Float[Tensor, "reader batch pos d_out"]]
    bias: Float[Tensor, "batch pos d_out"]
    scores: Float[Tensor, "reader batch pos"]
    sinks: dict[str, Float[Tensor, "reader batch pos"]]
    activation: Float[Tensor, "feature batch pos"]


def units_of(one: Standing, cache: RelevanceCache, table: Table) -> Units:
    """The units of a dictionary in a pass on the path "features", whose cache holds its `points`."""
    shape = cache.activations[one.point_in].shape[:2]
    x, other = _rows(one, cache.activations[one.point_in]), cache.reference_activations.get(one.point_in)
    other = None if other is None else _rows(one, other).expand_as(x)
    dictionary = one.dictionary.to(x)
    features = active_features(dictionary, x, other, rule=one.rule)
    g = {point: working(cache.coefficients[point]).flatten(0, 1) for point, _, _ in one.points_out}
    weights = dict(zip(g, dictionary.decoder, strict=True))
    coefficient = torch.stack([features.along(weights[point], rows) for point, rows in g.items()]).sum(0)
    difference, through = features.value - features.other, coefficient * features.slope
    split = _Split(features, one.chosen, dictionary.n_features)
    reads = split.vectors(through, dictionary.encoder)
    reads = reads - reads.mean(-1, keepdim=True) if dictionary.normalization == "layer_norm" else reads
    written = {point: split.vectors(difference, weight) for point, weight in weights.items()}
    scores, arrived = split.sums(coefficient * difference), split.sums(through * features.change)
    biases = split.sums(through * features.bias)
    first, past = one.points_out[0][0], linear_part(dictionary, x)
    zeros = x.new_zeros(len(x), dictionary.n_features)
    bias = dictionary.decode(zeros, x) - (0 if past is None else past)
    if other is not None:
        past_other = linear_part(dictionary, other)
        bias = bias - (dictionary.decode(zeros, other) - (0 if past_other is None else past_other))
        past = None if past is None or past_other is None else past - past_other
    stays = scores - arrived
    if past is not None:
        reads = torch.cat([reads, _back_past(dictionary, x, g[first]).unsqueeze(0)])
        written = {point: torch.cat([y, past.unsqueeze(0) if point == first else torch.zeros_like(y[:1])]) for point, y in written.items()}
        scores = torch.cat([scores, (past * g[first]).sum(-1).unsqueeze(0)])
        biases, stays = (torch.cat([part, torch.zeros_like(part[:1])]) for part in (biases, stays))
    by_position = lambda part: part.unflatten(1, shape)  # noqa: E731
    reads = by_position(reads)
    if one.norm is not None:
        name = str(one.norm.inputs[0].name)
        x_norm, other_norm = cache.activations[name], cache.reference_activations.get(name)
        reads = pull(one.norm, rule_for(table, one.norm), x_norm, reference=other_norm, upstream=reads)
    return Units(
        one,
        reads,
        {point: by_position(y) for point, y in written.items()},
        bias.unflatten(0, shape),
        by_position(scores),
        {"bias": by_position(biases), "activation": by_position(stays)},
        by_position(split.vectors(features.value, torch.ones_like(dictionary.encoder[:, :1]))[:-1, ..., 0]),
    )


def written_at(point: str, layer: int, units: Sequence[Units], *, cache: RelevanceCache, table: Table) -> list[Written]:
    """What all dictionaries that write to a HookPoint write there, past a norm where there is one; with their error and bias."""
    here = [one for one in units if point in one.written]
    norm = next(norm for name, _, norm in here[0].standing.points_out if name == point)
    owner = next((one for one in here if one.standing.points_out[0][0] == point), None)
    bias = None if owner is None else owner.bias
    error = change(cache, point) - sum(one.written[point].sum(0) for one in here) - (0 if bias is None else bias)
    names = [*(one.standing.readers for one in here), [str(Node(ERROR, layer))]]
    parts = torch.cat([*(one.written[point] for one in here), error.unsqueeze(0)])
    out, rest = point, bias
    if norm is not None:
        parts, rest = past_norm(norm, parts, norm.output_name, cache, cache, table)
        out = norm.output_name
    sizes = [len(part) for part in names]
    written = [Written(part, x, None, out) for part, x in zip(names, parts.split(sizes), strict=True)]
    written[-1] = Written(names[-1], written[-1].parts, rest, out)
    return written


class _Split:
    """Amounts of active features shared out over units: each chosen feature, and all others together."""

    def __init__(self, features: ActiveFeatures, chosen: tuple[int, ...], n_features: int) -> None:
        self.features, self.n, self.chosen = features, len(chosen), torch.tensor(chosen, dtype=torch.long, device=features.token.device)
        unit = torch.full((n_features,), self.n, device=features.token.device)
        unit[self.chosen] = torch.arange(self.n, device=unit.device)
        self._unit = unit[features.feature]

    def sums(self, amounts: Float[Tensor, " n"]) -> Float[Tensor, "unit token"]:
        """The amounts of each unit at each token."""
        totals = amounts.new_zeros(self.n + 1, self.features.n_tokens)
        return totals.index_put((self._unit, self.features.token), amounts, accumulate=True)

    def vectors(self, amounts: Float[Tensor, " n"], weight: Float[Tensor, "feature d"]) -> Float[Tensor, "unit token d"]:
        """For each unit and token the sum of its features' rows of a weight, each times an amount."""
        own = self.sums(amounts)[:-1].unsqueeze(-1) * weight[self.chosen].unsqueeze(1)
        others = self.features.written(weight, torch.where(self._unit == self.n, amounts, 0.0))
        return torch.cat([own, others.unsqueeze(0)])


def _rows(one: Standing, x: Tensor) -> Tensor:
    return as_rows(x, one.dictionary.d_in, f"{one.dictionary!r} reads", one.point_in)


def _back_past(dictionary: Dictionary, x: Tensor, g: Tensor) -> Tensor:
    """Coefficients at what is read, by way of what goes past the features."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        past = linear_part(dictionary, leaf)
        assert past is not None
        return torch.autograd.grad(past, leaf, g)[0]
