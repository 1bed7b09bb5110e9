"""The residual stream as it grows: who has written so far, against which each reader's coefficient is contracted."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.edges.transport import push
from analyses.edges.wiring import Wiring
from analyses.edges.writers import Written, change
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError
from lens_relevance.rules import Rule
from lens_relevance.rules.base import working
from lens_relevance.sites import Site

_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # fp64 models may compute their norms in fp32
_HALF_PRECISION_TOLERANCE = 5e-2


class ResidualStream:
    """Contributions of all writers, and the scores that grow from them.

    Args:
        cache: the pass whose coefficients count.
        values: the pass whose activations (less its reference's) are what is written.

    Contributions are kept as [batch * pos, 1 + writer, d_model], the first row being the stream itself where it is read: one matrix product
    per position then gives a reader all its edges and the relevance that enters it.
    """

    def __init__(self, wiring: Wiring, cache: RelevanceCache, values: RelevanceCache) -> None:
        self.cache, self.values, self.mask = cache, values, cache.mask
        self._padded = not bool(self.mask.all())
        self._row = {name: 1 + i for i, name in enumerate(wiring.writers)}
        self._column = {name: i for i, name in enumerate(wiring.readers)}
        entering = change(values, "blocks.0.hook_in").flatten(0, 1)
        rows = 1 + len(self._row)
        self._contributions = entering.new_zeros(len(entering), rows, entering.shape[-1])
        self._total = torch.zeros_like(entering)
        self._scores = entering.new_zeros(len(entering), rows, len(self._column))
        self._writer_scores = entering.new_zeros(len(entering), rows)
        self._filled = 1 + len(wiring.sources)

    @property
    def scores(self) -> Float[Tensor, "batch pos writer reader"]:
        """Relevance of every edge; 0 where there is none."""
        return self._scores[:, 1:].unflatten(0, self.mask.shape)

    @property
    def writer_scores(self) -> Float[Tensor, "batch pos writer"]:
        """Relevance of every writer at its own output."""
        return self._writer_scores[:, 1:].unflatten(0, self.mask.shape)

    @property
    def reader_scores(self) -> Float[Tensor, "batch pos reader"]:
        """Relevance that enters every reader."""
        return self._scores[:, 0].unflatten(0, self.mask.shape)

    def write(self, written: Written) -> None:
        """Add contributions; the rest adds to what `bias` has written so far."""
        coefficient = working(self.cache.coefficients[written.point]).flatten(0, 1)
        rows, parts = self._rows_of(written), self._by_row(written)
        self._contributions[:, rows] += parts  # features of a cross-layer transcoder write several times
        self._total += parts.sum(1)
        self._writer_scores[:, rows] += (parts @ coefficient.unsqueeze(-1)).squeeze(-1)
        self._filled = max(self._filled, rows.stop)
        if written.rest is not None:
            self._add_to_bias(self._real(written.rest).flatten(0, 1), coefficient)

    def hand_over(self, written: Written, readers: list[str], coefficients: Float[Tensor, "reader batch pos d_model"]) -> None:
        """Contributions that features alone read, as these write in their place."""
        rows, parts, first = self._rows_of(written), self._by_row(written), self._column[readers[0]]
        columns, weight = slice(first, first + len(readers)), self._real(coefficients).flatten(1, 2).permute(1, 2, 0)
        self._scores[:, rows, columns] = parts @ weight
        self._writer_scores[:, rows] = self._scores[:, rows, columns].sum(-1)
        self._scores[:, 0, columns] = self._scores[:, rows, columns].sum(1)
        self._filled = max(self._filled, rows.stop)
        if written.rest is not None:
            rest = (self._real(written.rest).flatten(0, 1).unsqueeze(1) @ weight).squeeze(1)
            self._scores[:, self._row["bias"], columns] += rest
            self._scores[:, 0, columns] += rest
            self._writer_scores[:, self._row["bias"]] += rest.sum(-1)

    def give_way(self) -> None:
        """Nothing of what was written goes on: features that read the stream write all of it anew."""
        self._contributions.zero_()
        self._total.zero_()

    def normalize(self, norm: Site, rule: Rule) -> None:
        """The stream passes a norm, and each contribution with it as the norm's rule has it; the rest of its output goes to `bias`."""
        name, out = str(norm.inputs[0].name), norm.output_name
        contributions = self._contributions[:, 1 : self._filled]
        parts = contributions.transpose(0, 1).unflatten(1, self.mask.shape)
        parts = push(norm, rule, self.cache.activations[name], reference=self.cache.reference_activations.get(name), parts=parts)
        contributions.copy_(self._real(parts).flatten(1, 2).transpose(0, 1))
        self._total = contributions.sum(1)
        rest = self._real(change(self.values, out)).flatten(0, 1) - self._total
        self._add_to_bias(rest, working(self.cache.coefficients[out]).flatten(0, 1))

    def read(self, names: list[str], coefficients: Float[Tensor, "reader batch pos d_model"], point: str) -> None:
        """Edges from everything written so far into these readers, whose stream is the activation at `point`."""
        entering = self._real(change(self.values, point)).flatten(0, 1)
        self._check_sum(entering, point)
        self._contributions[:, 0] = entering
        first = self._column[names[0]]
        edges = self._contributions[:, : self._filled] @ self._real(coefficients).flatten(1, 2).permute(1, 2, 0)
        self._scores[:, : self._filled, first : first + len(names)] = edges

    def _rows_of(self, written: Written) -> slice:
        first = self._row[written.names[0]]
        return slice(first, first + len(written.names))

    def _by_row(self, written: Written) -> Float[Tensor, "row writer d_model"]:
        return self._real(written.parts).flatten(1, 2).transpose(0, 1)

    def _add_to_bias(self, rest: Float[Tensor, "row d_model"], coefficient: Float[Tensor, "row d_model"]) -> None:
        bias = self._row["bias"]
        self._contributions[:, bias] += rest
        self._total += rest
        self._writer_scores[:, bias] += (rest * coefficient).sum(-1)

    def _real(self, x: Tensor) -> Tensor:
        """Zero at padding, whatever NaN a fully masked row may hold there."""
        return torch.where(self.mask.bool().unsqueeze(-1), x, torch.zeros_like(x)) if self._padded else x

    def _check_sum(self, entering: Tensor, point: str) -> None:
        """The stream must be the sum of what was written, or edges would not add up to anything."""
        activation = self._real(self.values.activations[point])
        scale = float(activation.abs().max())
        gap = float((self._total - entering).abs().max())
        if gap > _TOLERANCE.get(activation.dtype, _HALF_PRECISION_TOLERANCE) * scale:
            raise CoverageError(
                f"{point}: the residual stream is not the sum of what embeddings, heads, MLPs and biases are known to write "
                f"({gap:.1e} off at a scale of {scale:.1e}), so this model's edges cannot be told apart"
            )
