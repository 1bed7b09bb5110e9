"""The residual stream as it grows: who has written so far, against which each reader's coefficient is contracted."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.edges.wiring import Wiring
from analyses.edges.writers import change
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError
from lens_relevance.rules.base import share, working

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # fp64 models may compute their norms in fp32
_HALF_PRECISION_TOLERANCE = 5e-2


class Stream:
    """Contributions of all writers, and the scores that grow from them.

    values: the pass whose activations (less its reference's) are what is written; cache: the pass whose coefficients they meet.

    Contributions are kept as [batch * pos, writer, d_model]: one matrix product per position then gives a reader all its edges.
    """

    def __init__(self, wiring: Wiring, cache: RelevanceCache, values: RelevanceCache) -> None:
        self.cache, self.values = cache, values
        self.writers, self.readers = wiring.writers, wiring.readers
        self._writer = {name: i for i, name in enumerate(self.writers)}
        self._reader = {name: i for i, name in enumerate(self.readers)}
        self.mask = cache.mask
        batch, pos = self.mask.shape
        entering = change(values, "blocks.0.hook_in")
        self.contributions = entering.new_zeros(batch * pos, len(self.writers), entering.shape[-1])
        self.scores = entering.new_zeros(batch, pos, len(self.writers), len(self.readers))
        self.writer_scores = entering.new_zeros(batch, pos, len(self.writers))
        self.reader_scores = entering.new_zeros(batch, pos, len(self.readers))
        self.count = len(wiring.sources)

    def write(self, names: list[str], parts: Float[Tensor, "writer batch pos d_model"], point: str) -> None:
        """Add contributions, written at HookPoint `point`; `bias` collects every bias written so far."""
        parts, coefficient = self._real(parts), working(self.cache.coefficients[point])
        first, n = self._writer[names[0]], len(names) - ("bias" in names)
        self.contributions[:, first : first + n] += parts[:n].flatten(1, 2).transpose(0, 1)
        self.writer_scores[:, :, first : first + n] += share(parts[:n], coefficient).sum(-1).movedim(0, 2)
        self.count = max(self.count, first + n)
        if names[-1] == "bias":
            self.contributions[:, self._writer["bias"]] += parts[-1].flatten(0, 1)
            self.writer_scores[:, :, self._writer["bias"]] += share(parts[-1], coefficient).sum(-1)

    def read(self, names: list[str], coefficients: Float[Tensor, "reader batch pos d_model"], point: str) -> None:
        """Edges from everything written so far into these readers, whose stream is the activation at `point`."""
        coefficients = self._real(coefficients)
        written = self.contributions[:, : self.count]
        entering = self._real(change(self.values, point))
        self._check_sum(written, entering, point)
        first = self._reader[names[0]]
        where = slice(first, first + len(names))
        edges = written @ coefficients.flatten(1, 2).permute(1, 2, 0)
        self.scores[:, :, : self.count, where] = edges.unflatten(0, self.mask.shape)
        self.reader_scores[:, :, where] = share(entering, coefficients).sum(-1).movedim(0, 2)

    def _real(self, x: Tensor) -> Tensor:
        """Zero at padding, whatever NaN a fully masked row may hold there."""
        return x if bool(self.mask.all()) else torch.where(self.mask.bool().unsqueeze(-1), x, torch.zeros_like(x))

    def _check_sum(self, written: Tensor, entering: Tensor, point: str) -> None:
        """The stream must be the sum of what was written, or edges would not add up to anything."""
        activation = self._real(self.values.activations[point])
        scale = float(activation.abs().max())
        gap = float((written.sum(1) - entering.flatten(0, 1)).abs().max())
        if gap > _TOLERANCE.get(activation.dtype, _HALF_PRECISION_TOLERANCE) * scale:
            raise CoverageError(
                f"{point}: the residual stream is not the sum of what embeddings, heads, MLPs and biases are known to write "
                f"({gap:.1e} off at a scale of {scale:.1e}), so this model's edges cannot be told apart"
            )
