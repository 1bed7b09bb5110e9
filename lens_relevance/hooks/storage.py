"""Where tensors that are kept go: they stay where they are, move to a device, or are written to files."""

from __future__ import annotations

import os
import tempfile
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.memory.free_memory import free_for_files

IN_MEMORY = 2**29
"""Bytes that a run block by block keeps in memory; what is more goes to temporary files."""


class Storage:
    """Takes tensors to where they are kept.

    Args:
        place: A device, or a folder: each tensor is then written to a file of its own, in a new folder inside, and read when it is used
            (it is mapped into memory, from where the system can drop it again). None leaves tensors where they are.
        in_memory: Where `place` is None: the bytes that stay in a CPU's memory. What is more is written to temporary files, as long as
            there is room for them. They have no name, so that nothing of them is left when their tensors are gone, however the process
            ends. None: everything stays.
    """

    def __init__(self, place: torch.device | str | Path | None, in_memory: int | None = None) -> None:
        self._place, self._numbers, self._left = place, count(), in_memory
        if isinstance(place, Path):
            place.mkdir(parents=True, exist_ok=True)
            self._place = Path(tempfile.mkdtemp(prefix="relevance-", dir=place))

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, without its graph, where it is kept; raises RelevanceError where a folder has no room for it."""
        tensor = tensor.detach()
        if self._place is None:
            return tensor if self._stays(tensor) else self._in_temporary_file(tensor)
        if not isinstance(self._place, Path):
            return tensor.to(self._place)
        file = self._place / f"{next(self._numbers)}.pt"
        try:
            return _mapped(tensor, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a disk that is full
            raise RelevanceError(
                f"what is kept cannot be written to {self._place} ({' '.join(str(error).split())[:200]}); give another folder as "
                "device=, or keep fewer HookPoints (names_filter=)"
            ) from error

    def _stays(self, tensor: Tensor) -> bool:
        """Whether a tensor stays in memory."""
        if self._left is None or tensor.device.type != "cpu":
            return True
        self._left -= tensor.nbytes
        return self._left >= 0 or free_for_files() < 2 * tensor.nbytes

    def _in_temporary_file(self, tensor: Tensor) -> Tensor:
        """The tensor in a file that has no name any more; as it is, where it cannot be written."""
        handle, name = tempfile.mkstemp(prefix="relevance-", suffix=".pt")
        try:
            os.close(handle)
            return _mapped(tensor, Path(name))
        except (OSError, RuntimeError):
            return tensor
        finally:
            os.unlink(name)


def _mapped(tensor: Tensor, file: Path) -> Tensor:
    """A tensor written to a file, and mapped into memory from there."""
    torch.save(tensor.cpu().clone(), file)  # a view would be written with all that it is a view of
    stored: Tensor = torch.load(file, mmap=True, weights_only=True)
    return stored
