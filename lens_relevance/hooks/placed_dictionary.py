"""Dictionaries on a model's HookPoints: what they read, and what they write in place of what the model computes.

What passes a HookPoint stays as it is. It is taken for the sum of what features write and of an error, which is what the dictionary misses,
and each of them gets its coefficient. Under the path "features" relevance goes on through the features' encoders, and the error keeps its
share; under the path "model" it goes on as without dictionaries; under the path "direct" it ends at features and errors.

Like a rule, a dictionary stands outside the hooks of a HookPoint: it writes before they run, and reads after they have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lens_relevance.dictionaries.active import ActiveFeatures, active_features
from lens_relevance.dictionaries.dictionary import Dictionary
from lens_relevance.errors import LivenessError, RelevanceError
from lens_relevance.rules.base import Rule, working
from lens_relevance.sites.base import block_of

if TYPE_CHECKING:
    from lens_relevance.hooks.session import Session

DictionaryPath = Literal["features", "model", "direct"]
Tap = Callable[[str, Tensor], Tensor | None]


class PlacedDictionary:
    """A dictionary that reads at one HookPoint.

    Attributes:
        name: What its features' values are called among the tensors of a run.
        features: Those that are on in the forward under way.
        passes: Whether relevance goes on through what the dictionary writes, and not through what the model computes there.
        encodes: Whether it goes on through the features' encoders.
        target: A feature that relevance starts from.
    """

    def __init__(self, dictionary: Dictionary, point_in: str, points_out: tuple[str, ...], *, rule: Rule, path: DictionaryPath) -> None:
        self.dictionary, self.point_in, self.points_out, self.rule = dictionary, point_in, points_out, rule
        self.passes, self.encodes = path != "model", path == "features"
        self.name = f"{points_out[0]}:features"
        self.target: int | None = None
        self.session: Session | None = None
        self.tap: Tap = _untapped
        self.recorded: Tensor | None = None
        self._here: Dictionary | None = None
        self.reset()

    @property
    def target_name(self) -> str:
        """What the values of the feature that relevance starts from are called."""
        return f"{self.points_out[0]}:feature {self.target}"

    @property
    def skip_name(self) -> str:
        """What the affine skip connection writes is called."""
        return f"{self.points_out[0]}:skip"

    @property
    def layer(self) -> int | None:
        """Index of the block that it reads in."""
        return block_of(self.point_in)[1]

    @property
    def is_autoencoder(self) -> bool:
        """Whether it reads what it writes."""
        return self.points_out == (self.point_in,)

    def explain(self, feature: int) -> str:
        """Make a feature the target; gives the name of its values."""
        n = self.dictionary.n_features
        if not -n <= feature < n:
            raise RelevanceError(f"latent: feature {feature} is out of range at {self.points_out[0]}, whose dictionary has {n}")
        self.target = feature % n
        return self.target_name

    def reset(self) -> None:
        """Forget the forward before."""
        self.features: ActiveFeatures | None = None
        self.target_features: ActiveFeatures | None = None
        self.values: Tensor | None = None
        self.linear: Tensor | None = None
        self.linear_change: Tensor | None = None
        self.sent: dict[str, Tensor] = {}  # by HookPoint that it writes to, what each token's features have there, in the last backward

    def forget(self) -> None:
        """Let go of what the last passage left, the reference run's tensors among it."""
        self.reset()
        self.recorded = None

    def read(self, x: Tensor) -> None:
        """Take what passes the HookPoint that is read, after its hooks."""
        assert self.session is not None
        if self.session.recording:
            self.recorded = x.detach()
        if self.session.recording or not (torch.is_grad_enabled() and x.requires_grad):
            self._tell_of_target(x)
            return
        if self.values is not None:
            raise LivenessError(f"{self.point_in} fired twice in this forward, so that {self.dictionary!r} cannot tell which call to read")
        rows, other = self._rows(x.detach()), self.reference_rows(x)
        dictionary = self.here(rows)
        self.features = active_features(dictionary, rows, other, rule=self.rule)
        values = Encode.apply(self, self.features, x) if self.encodes else self.features.value.clone().requires_grad_()
        self.values = _tapped(self.tap(self.name, values), values)
        linear = linear_part(dictionary, self._rows(x if self.passes else x.detach()))
        if linear is not None:
            linear = linear if self.passes else linear.detach().requires_grad_()
            self.linear = _tapped(self.tap(self.skip_name, linear), linear)
            before = None if other is None else linear_part(dictionary, other)
            self.linear_change = linear.detach() if before is None else linear.detach() - before
        if self.target is not None:
            self.target_features = active_features(dictionary, rows, other, rule=self.rule, only=self.target)
            self.tap(self.target_name, Encode.apply(self, self.target_features, x).reshape(*x.shape[:-1], 1))

    def _tell_of_target(self, x: Tensor) -> None:
        """In a run without a graph the target is read all the same."""
        if self.target is None:
            return
        rows = self._rows(x.detach())
        dictionary = self.here(rows)
        values, scales = dictionary.encode(rows)[:, self.target], dictionary.scales(rows)
        values = values if scales is None else values * scales.out[:, 0]
        self.tap(self.target_name, values.reshape(*x.shape[:-1], 1))

    def _rows(self, x: Tensor) -> Tensor:
        """What is read as [token, d_in], in fp32 at least; heads side by side are one activation."""
        return as_rows(x, self.dictionary.d_in, f"{self.dictionary!r} reads", self.point_in)

    def here(self, like: Tensor) -> Dictionary:
        """The dictionary in the dtype and on the device of what passes."""
        self._here = (self._here or self.dictionary).to(like)
        return self._here

    def reference_rows(self, x: Tensor) -> Tensor | None:
        """What was read in the reference run, as rows; None without one."""
        return None if self.recorded is None else self._rows(expanded(self.recorded, x, self.point_in))


class WrittenPoint:
    """A HookPoint that dictionaries write to: one, or several of a cross-layer transcoder."""

    def __init__(self, point: str, dictionaries: list[PlacedDictionary]) -> None:
        self.point, self.dictionaries = point, dictionaries
        self.session: Session | None = None
        self.tap: Tap = _untapped
        self.recorded: Tensor | None = None
        self.reset()

    @property
    def error_name(self) -> str:
        """What the error is called among the tensors of a run."""
        return f"{self.point}:error"

    @property
    def layer(self) -> int | None:
        """Index of the block that it is in."""
        return block_of(self.point)[1]

    @property
    def passes(self) -> bool:
        """Whether relevance goes on through features."""
        return self.dictionaries[0].passes

    @property
    def is_autoencoder(self) -> bool:
        """Whether the dictionary reads what it writes."""
        return self.dictionaries[0].is_autoencoder

    def reset(self) -> None:
        """Forget the forward before."""
        self.fired = False
        self.node: Node | None = None
        self.error_change: Tensor | None = None
        self.bias_change: Tensor | None = None

    def forget(self) -> None:
        """Let go of what the last passage left, the reference run's tensors among it."""
        self.reset()
        self.recorded = None

    def write(self, y: Tensor) -> Tensor:
        """The same tensor, as the sum of what features write and an error."""
        assert self.session is not None
        self.fired = True
        own = y
        if self.passes:  # below the dictionary a tensor has another coefficient than above
            own = _tapped(self.tap(before_dictionary(self.point), y), y)
            own = own.view_as(y) if own is y and y.requires_grad else own
        if self.is_autoencoder:
            self.dictionaries[0].read(own)
        if self.session.recording:
            self.recorded = y.detach()
            return y
        if not (torch.is_grad_enabled() and y.requires_grad):
            return y
        for placed in self.dictionaries:
            if placed.values is None:
                raise LivenessError(
                    f"{self.point} fired before {placed.point_in}, which {placed.dictionary!r} reads, or nothing differentiable comes in "
                    "there; give point_in a HookPoint that lies before"
                )
        error = self._error(y).reshape(y.shape).requires_grad_()
        error = _tapped(self.tap(self.error_name, error), error)
        values = [placed.values for placed in self.dictionaries]
        linear = [placed.linear for placed in self.dictionaries if placed.linear is not None and placed.points_out[0] == self.point]
        written: Tensor = Write.apply(self, y.detach(), None if self.passes else y, error, *values, *linear)
        if self.passes:
            self.node = written.grad_fn
            self._refuse_bypass(y, own)
        return written

    def _error(self, y: Tensor) -> Tensor:
        """What the dictionaries miss [token, d_out]; its change between the two runs and that of the biases are kept."""
        owner = next((placed for placed in self.dictionaries if placed.points_out[0] == self.point), None)
        first = self.dictionaries[0]
        rows = as_rows(y.detach(), first.dictionary.d_out, f"{first.dictionary!r} writes", self.point)
        error, self.bias_change = rows - self._sum("value"), None
        other = None
        if self.recorded is not None:
            recorded = expanded(self.recorded, y, self.point)
            other = as_rows(recorded, first.dictionary.d_out, f"{first.dictionary!r} writes", self.point) - self._sum("other")
        if owner is not None:
            bias, other_bias = _bias_written(owner, rows, y)
            error = error - bias
            other = None if other is None else other - other_bias
            self.bias_change = bias if other is None else bias - other_bias
            if owner.linear is not None and owner.linear_change is not None:
                error = error - owner.linear.detach()
                other = None if other is None else other - (owner.linear.detach() - owner.linear_change)
        self.error_change = error if other is None else error - other
        return error

    def _sum(self, which: Literal["value", "other"]) -> Tensor:
        """What all features write, in this run or the reference run [token, d_out]."""
        parts = []
        for placed in self.dictionaries:
            features = placed.features
            assert features is not None
            weight = placed.here(features.value).decoder[placed.points_out.index(self.point)]
            parts.append(features.written(weight, getattr(features, which)))
        return torch.stack(parts).sum(0)

    def _refuse_bypass(self, y: Tensor, own: Tensor) -> None:
        """The model has to go on with what was written, and with that alone."""
        what = f"{self.dictionaries[0].dictionary!r} was bypassed: the model does not go on with what {self.point} returns, or only in part"
        sent: list[Tensor] = []

        def refuse(arrived: Tensor) -> None:
            if not sent or not torch.equal(arrived.nan_to_num(), sent.pop().nan_to_num()):
                raise LivenessError(f"{what}. Name a HookPoint whose tensor the model uses")

        if self.is_autoencoder:
            own.register_hook(sent.append)
        y.register_hook(refuse)


class Encode(torch.autograd.Function):
    """The values of features that are on, with the backward of their activation's rule and the encoder."""

    @staticmethod
    def forward(ctx: Any, placed: PlacedDictionary, features: ActiveFeatures, x: Tensor) -> Tensor:
        ctx.placed, ctx.features, ctx.shape, ctx.dtype = placed, features, x.shape, x.dtype
        return features.value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None, Tensor]:
        features = ctx.features
        amounts = upstream[0].reshape(-1) * features.slope
        dictionary = ctx.placed.here(amounts)
        read = features.written(dictionary.encoder, amounts)
        if dictionary.normalization == "layer_norm":
            read = read - read.mean(-1, keepdim=True)
        return None, None, read.reshape(ctx.shape).to(ctx.dtype)


class Write(torch.autograd.Function):
    """What the model computes at a HookPoint, as the sum of what features, an error and skip connections give."""

    @staticmethod
    def forward(ctx: Any, point: WrittenPoint, y: Tensor, own: Tensor | None, error: Tensor, *parts: Tensor) -> Tensor:
        ctx.point, ctx.own, ctx.shapes = point, own is not None, [part.shape for part in parts]
        ctx.features = [placed.features for placed in point.dictionaries]
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        point: WrittenPoint = ctx.point
        g = working(upstream[0])
        rows = g.reshape(-1, point.dictionaries[0].dictionary.d_out)
        passed = []
        for placed, features in zip(point.dictionaries, ctx.features, strict=True):
            weight = placed.here(rows).decoder[placed.points_out.index(point.point)]
            coefficient = features.along(weight, rows)
            placed.sent[point.point] = features.by_token((features.value - features.other) * coefficient)
            passed.append(coefficient)
        skips = [rows.reshape(shape) for shape in ctx.shapes[len(passed) :]]
        return None, None, upstream[0] if ctx.own else None, g, *passed, *skips


def before_dictionary(point: str) -> str:
    """What a tensor is called that a dictionary is given, where what it writes is called by the HookPoint."""
    return f"{point} (before its dictionary)"


def dictionary_at(dictionaries: Sequence[PlacedDictionary], point: str) -> PlacedDictionary:
    """The dictionary that (first) writes to a HookPoint.

    Raises:
        RelevanceError: There is none.
    """
    for placed in dictionaries:
        if placed.points_out[0] == point:
            return placed
    listed = ", ".join(placed.points_out[0] for placed in dictionaries)
    raise RelevanceError(f"no dictionary writes to {point}: " + (f"those given write to {listed}" if listed else "pass dictionaries=[...]"))


def linear_part(dictionary: Dictionary, x: Tensor) -> Tensor | None:
    """What goes past the features from what is read to what is written [token, d_out]: a skip connection, or the mean of a token."""
    if dictionary.normalization == "layer_norm":
        return x.mean(-1, keepdim=True).expand(-1, dictionary.d_out)
    return None if dictionary.skip is None else x @ dictionary.skip.T


def as_rows(x: Tensor, size: int, what: str, point: str) -> Tensor:
    """An activation as [token, size]; heads side by side are one."""
    if x.shape[-1] != size and not (x.ndim == 4 and x.shape[-1] * x.shape[-2] == size):
        raise RelevanceError(
            f"{what} activations of size {size}, and {point} has {list(x.shape)}: it is the dictionary of another model or HookPoint"
        )
    return working(x).reshape(-1, size)


def expanded(recorded: Tensor, x: Tensor, point: str) -> Tensor:
    """What the reference run had at a HookPoint, in the shape of the run's own."""
    if recorded.shape == x.shape:
        return recorded
    if recorded.shape[1:] != x.shape[1:] or recorded.shape[0] != 1:
        raise RelevanceError(
            f"the run and its reference differ in shape at {point} ({tuple(x.shape)} against {tuple(recorded.shape)}); pass a reference of "
            "the same number of tokens and rows"
        )
    return recorded.expand_as(x)


def _bias_written(placed: PlacedDictionary, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's bias in this run and in the reference run, [token, d_out] where tokens' norms scale it."""
    dictionary = placed.here(rows)
    bias, other = dictionary.decoder_bias, placed.reference_rows(y) if dictionary.normalization != "none" else None
    scales = dictionary.scales(rows)
    if scales is None:
        return bias, bias
    others = None if other is None else dictionary.scales(other)
    return scales.out * bias, torch.zeros_like(rows) if others is None else others.out * bias


def _tapped(tapped: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor if tapped is None else tapped


def _untapped(name: str, tensor: Tensor) -> None:
    return None
