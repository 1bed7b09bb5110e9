"""The number that a patched run is judged by, and the logits at which it looks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError

Metric = Callable[[Tensor], Tensor]

FEW = 8
"""The unembedding is confined to the tokens that are read where they are at most one in so many."""


class Readout:
    """A metric with what it reads, so that no other logits need to be computed.

    Attributes:
        columns: positions [column] at which the metric reads the logits of some row, of those at which they were `computed` (None: all).
        tokens: tokens [token] whose logits it reads there, of some row; None for the whole vocabulary.
    """

    def __init__(self, metric: Metric, logits: Float[Tensor, "n pos d_vocab"], computed: Int[Tensor, " pos"] | None = None) -> None:
        self.metric = metric
        value, read = evaluate(metric, logits), _read(metric, logits)
        self._index: Int[Tensor, " column"] = read.any(dim=1).nonzero().flatten()
        tokens: Int[Tensor, " token"] = read.any(dim=0).nonzero().flatten()
        self.tokens = tokens if len(tokens) * FEW <= logits.shape[-1] else None
        # Whatever is not read stays NaN: a metric that looks elsewhere after all returns NaN and is caught here.
        self._logits = torch.full_like(logits, torch.nan)
        if self.tokens is not None and not torch.equal(self(logits[:, self._index][:, :, self.tokens]), value):
            self.tokens = None
        if self.tokens is None and not torch.equal(self(logits[:, self._index]), value):
            self._index = torch.arange(logits.shape[1], device=logits.device)
        self.columns: Int[Tensor, " column"] = self._index if computed is None else computed.to(self._index)[self._index]

    def __call__(self, logits: Float[Tensor, "n column token"]) -> Float[Tensor, " n_or_1"]:
        """The metric of one run from its logits of `tokens` at `columns`."""
        if self.tokens is None:
            self._logits[:, self._index] = logits
        else:
            self._logits[:, self._index[:, None], self.tokens] = logits
        return evaluate(self.metric, self._logits).clone()  # a metric may give a view of the logits, which the next run overwrites


def evaluate(metric: Metric, logits: Float[Tensor, "n pos d_vocab"]) -> Float[Tensor, " n_or_1"]:
    """The metric of one run: one value per row, or one in all if the metric returns a scalar.

    Raises:
        RelevanceError: it returns anything else.
    """
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape not in ((), (1,), (len(logits),)):
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RelevanceError(
            f"a metric maps logits [batch, pos, d_vocab] to [batch] or a scalar; for batch {len(logits)} it returned {got}"
        )
    value = value.detach().reshape(-1)
    return value if value.is_floating_point() else value.to(torch.float32)


def _read(metric: Metric, logits: Float[Tensor, "n pos d_vocab"]) -> Bool[Tensor, "pos d_vocab"]:
    """Which logits of some row the metric's gradient reaches; all if it has none (an accuracy, say)."""
    with torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        value = metric(leaf)
        if not value.requires_grad:
            return torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return (gradient != 0).any(dim=0)
