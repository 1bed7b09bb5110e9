"""A function of the logits as a metric: it is given the logits of all rows it was made for, or of some where this is the same.

A function can hold something for each row of a data set (`lambda logits: logits[rows, -1, answers]`) without any sign of it. So whether the
values of some rows follow from the logits of these rows alone is tried, on random logits. Where they do not, the function is given logits
of the size it was made for, of which only the rows at hand are filled in, and its values for these rows are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.metrics import Metric
from lens_relevance.inputs.read_logits import ReadLogits

REMEDY = (
    "give logit(...), logit_diff(...) or log_prob(...) with one answer per row, or a function whose value for a row depends on that row's "
    "logits alone"
)
# Rounding differs with the number of rows; a value read from another row or token differs by more.
_TOLERANCE = 1e-5
# A gradient of the same size, and another one while it is summed up.
_TENSORS_AT_ONCE = 3


class FunctionMetric(Metric):
    """A function that was made for the logits of `n` rows, as a function of the logits of some of them.

    rows: which ones, in the order of the logits that are given; a row may come more than once. None: all of them.
    like: what logits of no rows are like, for which the function's positions are found out; None: it is not known.
    """

    def __init__(
        self,
        function: Callable[[Any], Tensor],
        n: int,
        rows: Int[Tensor, " row"] | None = None,
        like: Float[Tensor, "0 pos d_vocab"] | None = None,
    ) -> None:
        super().__init__(function)
        self.n, self.like = n, like
        self.rows = None if rows is None or torch.equal(rows.cpu(), torch.arange(n)) else rows.cpu()
        self._apart: bool | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.rows is None:
            return _checked(self.function(logits), len(logits))
        if self._apart is None:
            self._apart = self.gives_rows_apart(logits)
        return _checked(self.function(logits), len(logits)) if self._apart else self._among_all_rows(logits)

    @property
    def at(self) -> Int[Tensor, "batch n"] | None:
        return None if self._columns is None else self._columns.expand(self.n if self.rows is None else len(self.rows), -1)

    def of_read(self) -> Metric:
        if self._columns is None or self.like is None:
            return self
        return FunctionMetric(partial(_of_columns, self.function, self._columns, self.like.shape[1]), self.n, self.rows)

    @cached_property
    def _columns(self) -> Int[Tensor, " column"] | None:
        """The positions that the function reads, by index; None: all of them, or whatever it does with them."""
        if self.like is None or not self.like.shape[-1]:
            return None
        tried = ReadLogits(random_logits(self.n, self.like), None, self.like.shape[1])
        try:  # anything may come of a function that is given something else than a tensor
            with torch.no_grad(), _Bounded(_free_bytes(self.like.device) // _TENSORS_AT_ONCE):
                self.function(tried)
        except Exception:
            return None
        return torch.tensor(sorted(tried.read)) if 0 < len(tried.read) < self.like.shape[1] else None

    def gives_rows_apart(self, logits: Float[Tensor, "_ ..."]) -> bool:
        """Whether the function's values for the rows follow from their logits alone; `logits` tells the shape of a row's.

        Discrete values (an accuracy) can be the same by chance, and count as a no.
        """
        if self.rows is None:
            return True
        everything = random_logits(self.n, logits)
        try:  # of what a function does with logits of other rows than it expects, anything may come
            with torch.no_grad(), _Bounded(_free_bytes(logits.device) // _TENSORS_AT_ONCE):
                whole = self.function(everything)
                part = self.function(everything[self._slice() or self.rows.to(logits.device)])
        except Exception:
            return False
        if not all(isinstance(value, Tensor) and value.is_floating_point() for value in (whole, part)):
            return False
        if whole.shape != (self.n,) or part.shape != self.rows.shape or len(whole.unique()) < self.n:
            return False
        expected = whole[self.rows.to(whole.device)]
        return bool(((part - expected).abs() <= _TOLERANCE * (1 + expected.abs())).all())

    def _slice(self) -> slice | None:
        """The rows as a slice, of which a view can be had, where they are consecutive."""
        assert self.rows is not None
        first = int(self.rows[0]) if len(self.rows) else 0
        consecutive = torch.equal(self.rows, torch.arange(first, first + len(self.rows)))
        return slice(first, first + len(self.rows)) if consecutive else None

    def _among_all_rows(self, logits: Float[Tensor, "row ..."]) -> Float[Tensor, " row"]:
        assert self.rows is not None
        size = self.n * logits[0].numel() * logits.element_size()
        if size * _TENSORS_AT_ONCE > _free_bytes(logits.device):
            raise RelevanceError(
                f"the value of the function for a row does not follow from that row's logits alone, and logits of all {self.n} rows that "
                f"it was made for take {size / 2**30:.1f} GiB: {REMEDY}"
            )
        # A row that comes twice is filled in twice, one after the other.
        turn = (self.rows.unsqueeze(1) == self.rows).tril(-1).sum(1)
        parts, order = [], []
        for chosen in ((turn == i).nonzero().flatten() for i in range(int(turn.max()) + 1)):
            rows = self.rows[chosen].to(logits.device)
            everything = torch.full((self.n, *logits.shape[1:]), torch.nan, dtype=logits.dtype, device=logits.device)
            everything[rows] = logits[chosen.to(logits.device)]
            value = self._of_all_rows(everything)
            parts.append(value[rows.to(value.device)])
            order.append(chosen)
        values = torch.cat(parts)[torch.cat(order).argsort()]
        if bool(values.isnan().any()) and not bool(logits.isnan().any()):
            raise RelevanceError(
                f"the value of the function for a row depends on logits of other rows, and of {self.n} rows {len(self.rows)} are run at a "
                f"time: {REMEDY}, or run all rows in one batch (batch_size={self.n})"
            )
        return values

    def _of_all_rows(self, everything: Tensor) -> Float[Tensor, " n"]:
        try:
            value = _checked(self.function(everything), self.n)
        except RelevanceError:
            raise
        except Exception as error:  # the user's own code
            raise RelevanceError(
                f"the function fails on logits {list(everything.shape)} of the {self.n} rows that it was made for "
                f"({type(error).__name__}: {error}): {REMEDY}"
            ) from error
        if value.ndim == 0:
            raise RelevanceError(
                f"the function gives one number for all pairs ({self.n} rows), which cannot be told from some of them: return one value "
                f"per row [batch], or run all rows in one process and one batch (batch_size={self.n})"
            )
        return value


def _of_columns(function: Callable[[Any], Tensor], columns: Tensor, n_pos: int, logits: Tensor) -> Tensor:
    return function(ReadLogits(logits, columns, n_pos))


def _checked(value: Any, batch: int) -> Tensor:
    if isinstance(value, Tensor) and value.shape == (1,) and batch > 1:
        value = value[0]
    if not isinstance(value, Tensor) or value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise RelevanceError(f"a target must give a scalar or one value per example [{batch}], got {shape}")
    return value


def random_logits(n: int, like: Float[Tensor, "_ ..."]) -> Float[Tensor, "n ..."]:
    """Random logits of n rows, each of the shape of a row of `like`, in next to no memory: all rows overlap in one short row of numbers."""
    shape = (n, *like.shape[1:])
    strides = (101, 10_007)[: len(shape) - 1] + (1,)
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32  # of few bits, different values would often be equal
    numbers = torch.randn(length, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return numbers.to(like.device).as_strided(shape, strides)


class _Bounded(TorchDispatchMode):
    """Raises MemoryError instead of an operation that would write more than so many bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not operation.is_view and self._exceeded((args, kwargs)):
            given, named = tree_map(_without_memory, (args, kwargs))
            if self._exceeded(operation(*given, **named)):
                raise MemoryError
        return operation(*args, **kwargs)

    def _exceeded(self, values: Any) -> bool:
        return any(isinstance(x, Tensor) and x.numel() * x.element_size() > self.limit for x in tree_leaves(values))


def _without_memory(value: Any) -> Any:
    """A tensor's shape alone, and no device that has memory."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def _free_bytes(device: torch.device) -> int:
    """Memory that a tensor on this device can take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
