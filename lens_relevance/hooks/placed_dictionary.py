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
        self.tap: Tap = untapped
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
        """Let go of what the last passage left, the reference run's tensors among it, and of the session, which holds the model."""
        self.reset()
        self.recorded = None
        self.session, self.tap = None, untapped

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
        self.values = tapped_or(self.tap(self.name, values), values)
        linear = linear_part(dictionary, self._rows(x if self.passes else x.detach()))
        if linear is not None:
            linear = linear if self.passes else linear.detach().requires_grad_()
            self.linear = tapped_or(self.tap(self.skip_name, linear), linear)
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


def untapped(name: str, tensor: Tensor) -> None:
    """No tap."""
    return None


def tapped_or(tapped: Tensor | None, tensor: Tensor) -> Tensor:
    """What a tap gave in place of a tensor, or the tensor."""
    return tensor if tapped is None else tapped
