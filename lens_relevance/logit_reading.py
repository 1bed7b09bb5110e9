"""Forwards that compute logits only where somebody reads them: a metric with its positions, or none at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.read_positions import ReadPositions, can_take, reading_at
from lens_relevance.inputs.class_labels import class_names
from lens_relevance.inputs.metrics import Metric, by_position


def can_read_some(model: HookedModel) -> bool:
    """Whether logits can be computed at some positions alone; those of a classifier have none."""
    return can_take(model) and class_names(model) is None


def logits_with_positions(
    logits: Tensor, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch at d_vocab"], Int[Tensor, "batch at"], Int[Tensor, "batch at"]]:
    """Logits, tokens and mask of the positions that a target chooses from: those of the text, or the one of a classifier."""
    logits = by_position(logits)
    if logits.shape[1] != tokens.shape[1]:
        tokens = tokens.new_zeros(logits.shape[:2])
        mask = torch.ones_like(tokens)
    return logits, tokens, mask


class LogitReading:
    """A metric with the positions at which it reads logits, for forwards that compute no others.

        reading = LogitReading(model, metric, n_pos)
        with reading.narrow():
            logits = model(tokens)
        value = reading.metric(logits)

    Args:
        metric: of the logits [batch, pos, d_vocab] of tokens [batch, n_pos].

    Attributes:
        at: positions [batch, read] of the logits that a forward inside `narrow` gives; None: all.
        metric: of the logits [batch, read, d_vocab] there.
    """

    def __init__(self, model: HookedModel, metric: Metric, n_pos: int) -> None:
        self.model, self.metric, self.n_pos = model, metric, n_pos
        self.at: Int[Tensor, "batch read"] | None = None
        if can_read_some(model) and metric.at is not None:
            self.at, self.metric = metric.at, metric.of_read()

    @contextmanager
    def narrow(self, copies: int = 1) -> Iterator[None]:
        """Around forwards of so many copies of the rows, one after the other."""
        with logits_at(self.model, None if self.at is None else self.at.repeat(copies, 1), self.n_pos):
            yield


@contextmanager
def logits_at(model: HookedModel, at: Int[Tensor, "batch read"] | None, n_pos: int) -> Iterator[None]:
    """Logits [batch, read, d_vocab] at these positions alone, in forwards of tokens [batch, n_pos]; None: at all.

    Raises:
        RelevanceError: the model's unembedding does not see one vector per token.
    """
    reading = None if at is None else ReadPositions(at, n_pos)
    with reading_at(model, reading):
        yield
    if reading is not None and not reading.taken:
        raise RelevanceError("the unembedding of this model did not get one vector per token, so its logits have no positions")


@contextmanager
def without_logits(model: HookedModel, tokens: Int[Tensor, "batch pos"]) -> Iterator[None]:
    """Around forwards of which the activations alone are wanted: of the logits, those of each row's first token are computed."""
    first = torch.zeros(len(tokens), 1, dtype=torch.long)
    with reading_at(model, ReadPositions(first, tokens.shape[1]) if can_read_some(model) else None):
        yield
