"""Logits of which only some positions are there, for functions that index them: `lambda logits: logits[:, -1, token]`.

Which positions a function reads is told by the function itself: it is called with an object that has the shape of all logits, gives what it
is asked for by index, and notes the positions. Whatever else a function does with the logits needs all of them. As it is called with such
an object in the end, too, it can have no value that rests on logits which are not there.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.errors import RelevanceError


class AllLogitsNeededError(RelevanceError):
    """The function does something else with the logits than to index them."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the function uses the logits otherwise than by index ({what}), and did not when it was tried on random logits: let it read "
            "the positions that it may need first, as in logits[:, -1]"
        )


class ReadLogits:
    """Logits [batch, pos, d_vocab] that can be indexed, at the positions `columns`; None: at all of them. `read`: positions asked for."""

    ndim = 3

    def __init__(self, logits: Float[Tensor, "batch column d_vocab"], columns: Int[Tensor, " column"] | None, n_pos: int) -> None:
        self.read: set[int] = set()
        self._logits, self._columns, self._n_pos = logits, columns, n_pos

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self._logits), self._n_pos, self._logits.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self._logits.device

    @property
    def dtype(self) -> torch.dtype:
        return self._logits.dtype

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return len(self._logits)

    def __getitem__(self, index: Any) -> Tensor:
        rows, position, *tokens = _three(index if isinstance(index, tuple) else (index,))
        return self._logits[(rows, self._there(position), *tokens)]

    def __getattr__(self, name: str) -> Any:
        raise AllLogitsNeededError(name)

    def __iter__(self) -> Any:
        raise AllLogitsNeededError("iteration")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AllLogitsNeededError(str(function))

    def _there(self, position: Any) -> Any:
        """The index among the columns of an index among all positions."""
        if isinstance(position, Tensor):
            position = position.cpu()
        asked = torch.arange(self._n_pos)[position]
        self.read.update(asked.flatten().tolist())
        if self._columns is None:
            return position
        match = asked.unsqueeze(-1) == self._columns
        if not bool(match.any(-1).all()):
            raise RelevanceError(
                f"the function reads positions {sorted(set(asked.flatten().tolist()))} of these logits, and of others "
                f"{self._columns.tolist()}: let it read all positions that it may need before it decides, as in logits[:, [3, -1]]"
            )
        where = match.long().argmax(-1)
        if isinstance(position, slice):
            return slice(int(where[0]), int(where[-1]) + 1) if len(where) else slice(0, 0)
        return int(where) if where.ndim == 0 else where


def _three(index: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index of rows, positions and tokens; raises AllLogitsNeededError for what is none, or changes their order."""
    given = [entry for entry in index if entry is not Ellipsis]
    if len(given) < len(index):
        at = next(i for i, entry in enumerate(index) if entry is Ellipsis)
        index = (*index[:at], *[slice(None)] * (3 - len(given)), *index[at + 1 :])
    index = (*index, *[slice(None)] * (3 - len(index)))
    masks = any(isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.ndim > 1 for entry in index)
    stepped = isinstance(index[1], slice) and index[1].step not in (None, 1)
    if len(index) != 3 or any(entry is None or isinstance(entry, bool) for entry in index) or masks or stepped:
        raise AllLogitsNeededError(str(index))
    return index
