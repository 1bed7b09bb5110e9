"""What the heads of a model are scored on: runs of it, each with a target and a counterpart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.inputs.metrics import AtPositions, LogProbs, Metric
from lens_relevance.inputs.targets import Target


@dataclass(frozen=True)
class Case:
    """Some runs of equal length.

    Attributes:
        inputs: what the model is called with: token ids [example, pos], or its keyword arguments.
        reference: the same for the runs that these are compared with.
        target: what is explained, one number per example.
        role: how much each head does what its role says, [example, layer, head], measured on its attention alone.
    """

    inputs: Any
    reference: Any
    target: Target
    role: Float[Tensor, "example layer head"]


@dataclass(frozen=True, eq=False)
class Written(Target):
    """The summed log-probability of what is written at some positions. Units: nats.

    Attributes:
        at: positions that predict it.
        tokens: what they predict.
    """

    at: Int[Tensor, "example token"]
    tokens: Int[Tensor, "example token"]

    def metric(self, model: Any, tokens: Tensor, attention_mask: Tensor | None = None) -> Metric:
        return AtPositions(self.at, LogProbs(self.tokens))
