"""Which features of a dictionary are on, and how strongly: its activation functions.

A feature's value is a function of its own pre-activation alone, but for TopK, where the pre-activations of the others say how high it has
to be. `at` gives the function of chosen features, which the element-wise rules of a ruleset pass; for TopK it has the threshold of each
token's own run, so that a feature that is on in one of two runs alone has an exact secant as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError

Function = Callable[[Float[Tensor, " n"]], Float[Tensor, " n"]]


class FeatureActivation(ABC):
    """From the pre-activations of all features [token, feature] to their values."""

    @abstractmethod
    def __call__(self, before: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        """The values of all features."""

    @abstractmethod
    def at(self, before: Float[Tensor, "token feature"], token: Int[Tensor, " n"], feature: Int[Tensor, " n"]) -> Function:
        """The function of n chosen features, each at a token, from their pre-activations [n] to their values [n]."""

    def sizes(self) -> dict[str, int]:
        """How many features its parameters are for, by the parameter's name."""
        return {}

    def to(self, like: Float[Tensor, "*_shape"]) -> FeatureActivation:
        """The same with its parameters in the dtype and on the device of a tensor."""
        return self


@dataclass(frozen=True)
class ReLU(FeatureActivation):
    """max(x, 0).

    Source: Cunningham et al. 2023, arXiv 2309.08600.
    """

    def __call__(self, before: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        return before.relu()

    def at(self, before: Float[Tensor, "token feature"], token: Int[Tensor, " n"], feature: Int[Tensor, " n"]) -> Function:
        return torch.relu


@dataclass(frozen=True, eq=False)
class JumpReLU(FeatureActivation):
    """x where x > threshold, else 0 (Rajamanoharan et al. 2024, arXiv 2407.14435). BatchTopK is this, with the threshold that it learned.

    threshold: [feature].
    """

    threshold: Float[Tensor, " feature"]

    def __call__(self, before: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        return torch.where(before > self.threshold, before, 0.0)

    def at(self, before: Float[Tensor, "token feature"], token: Int[Tensor, " n"], feature: Int[Tensor, " n"]) -> Function:
        return _Above(self.threshold[feature])

    def sizes(self) -> dict[str, int]:
        return {"threshold": len(self.threshold)}

    def to(self, like: Float[Tensor, "*_shape"]) -> JumpReLU:
        return JumpReLU(self.threshold.to(like))


@dataclass(frozen=True)
class TopK(FeatureActivation):
    """max(x, 0) for the k largest of each token (Gao et al. 2024, arXiv 2406.04093)."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise RelevanceError(f"TopK keeps at least one feature, got k={self.k}")

    def __call__(self, before: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        top = before.topk(min(self.k, before.shape[-1]), dim=-1)
        return torch.zeros_like(before).scatter(-1, top.indices, top.values.relu())

    def at(self, before: Float[Tensor, "token feature"], token: Int[Tensor, " n"], feature: Int[Tensor, " n"]) -> Function:
        """Each token's k-th largest pre-activation is the threshold, from which on a feature is on."""
        lowest = before.topk(min(self.k, before.shape[-1]), dim=-1).values[..., -1].clamp(min=0)
        return _Above(lowest[token], includes=True)


@dataclass(frozen=True, eq=False)
class Gated(FeatureActivation):
    """max(exp(scale) x + magnitude_bias, 0) where x + gate_bias > 0 (Rajamanoharan et al. 2024, arXiv 2404.16014); x has no bias.

    gate_bias, magnitude_bias, scale: [feature].
    """

    gate_bias: Float[Tensor, " feature"]
    magnitude_bias: Float[Tensor, " feature"]
    scale: Float[Tensor, " feature"]

    def __call__(self, before: Float[Tensor, "*token feature"]) -> Float[Tensor, "*token feature"]:
        return torch.where(before + self.gate_bias > 0, (self.scale.exp() * before + self.magnitude_bias).relu(), 0.0)

    def at(self, before: Float[Tensor, "token feature"], token: Int[Tensor, " n"], feature: Int[Tensor, " n"]) -> Function:
        return self.of_part(feature)

    def of_part(self, chosen: Int[Tensor, " n"] | Bool[Tensor, " feature"]) -> Gated:
        """The function of some of the features."""
        return Gated(self.gate_bias[chosen], self.magnitude_bias[chosen], self.scale[chosen])

    def sizes(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("gate_bias", "magnitude_bias", "scale")}

    def to(self, like: Float[Tensor, "*_shape"]) -> Gated:
        return Gated(self.gate_bias.to(like), self.magnitude_bias.to(like), self.scale.to(like))


@dataclass(frozen=True, eq=False)
class _Above:
    """x where it is above a threshold, or equal to it, else 0."""

    threshold: Tensor
    includes: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        on = x >= self.threshold if self.includes else x > self.threshold
        return torch.where(on, x, 0.0)

    def of_part(self, chosen: Tensor) -> _Above:
        """The function of some of the entries."""
        return _Above(self.threshold[chosen], self.includes)
