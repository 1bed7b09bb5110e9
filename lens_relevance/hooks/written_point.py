"""A HookPoint that dictionaries write to: the sum of what their features, an error and skip connections give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lens_relevance.errors import LivenessError
from lens_relevance.hooks.placed_dictionary import PlacedDictionary, Tap, as_rows, before_dictionary, expanded, tapped_or, untapped
from lens_relevance.rules.base import working
from lens_relevance.sites.base import block_of

if TYPE_CHECKING:
    from lens_relevance.hooks.session import Session


class WrittenPoint:
    """A HookPoint that dictionaries write to: one, or several of a cross-layer transcoder."""

    def __init__(self, point: str, dictionaries: list[PlacedDictionary]) -> None:
        self.point, self.dictionaries = point, dictionaries
        self.session: Session | None = None
        self.tap: Tap = untapped
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
        """Let go of what the last passage left, the reference run's tensors among it, and of the session, which holds the model."""
        self.reset()
        self.recorded = None
        self.session, self.tap = None, untapped

    def write(self, y: Tensor) -> Tensor:
        """The same tensor, as the sum of what features write and an error."""
        assert self.session is not None
        self.fired = True
        own = y
        if self.passes:  # below the dictionary a tensor has another coefficient than above
            own = tapped_or(self.tap(before_dictionary(self.point), y), y)
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
        error = tapped_or(self.tap(self.error_name, error), error)
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


def _bias_written(placed: PlacedDictionary, rows: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The decoder's bias in this run and in the reference run, [token, d_out] where tokens' norms scale it."""
    dictionary = placed.here(rows)
    bias, other = dictionary.decoder_bias, placed.reference_rows(y) if dictionary.normalization != "none" else None
    scales = dictionary.scales(rows)
    if scales is None:
        return bias, bias
    others = None if other is None else dictionary.scales(other)
    return scales.out * bias, torch.zeros_like(rows) if others is None else others.out * bias
