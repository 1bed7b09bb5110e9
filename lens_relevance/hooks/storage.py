"""Where tensors that are kept go: they stay where they are, move to a device, or are written to a folder."""

from __future__ import annotations

import tempfile
from itertools import count
from pathlib import Path

import torch
from torch import Tensor


class Storage:
    """Takes tensors to where they are kept.

    Args:
        place: A device, or a folder: each tensor is then written to a file of its own, in a new folder inside, and read when it is used
            (it is mapped into memory, from where the system can drop it again). None leaves tensors where they are.
    """

    def __init__(self, place: torch.device | str | Path | None) -> None:
        self._place, self._numbers = place, count()
        if isinstance(place, Path):
            place.mkdir(parents=True, exist_ok=True)
            self._place = Path(tempfile.mkdtemp(prefix="relevance-", dir=place))

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, without its graph, where it is kept."""
        tensor = tensor.detach()
        if self._place is None:
            return tensor
        if not isinstance(self._place, Path):
            return tensor.to(self._place)
        file = self._place / f"{next(self._numbers)}.pt"
        torch.save(tensor.cpu().clone(memory_format=torch.contiguous_format), file)  # a view would be written with all that it is a view of
        stored: Tensor = torch.load(file, mmap=True, weights_only=True)
        return stored
