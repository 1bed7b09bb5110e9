"""The tensors that live at each moment of a run, counted by powers of its batch size and its length.

A run on B prompts of T tokens, two primes that divide no dimension of the model, tells by itself how it grows: a tensor whose number of
entries contains B once and T twice is one of [batch, ..., pos, ..., pos]. The sum over the tensors that live at one moment is a polynomial
in batch size and length, and the largest over all moments is the peak of a run of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lens_relevance.memory.trial import in_piece

_SHAPE = (2, 3, 4)  # outside and inside of attention's pieces; power of batch; power of positions
_FILE = torch.ops.aten.set_.source_Storage_storage_offset  # gives a tensor that is mapped from a file


class Allocations(TorchDispatchMode):
    """Counts while it is entered.

    Args:
        batch: A prime.
        positions: Another one.
        device: Whose tensors are counted.
        there: Tensors that are there already, and are not counted.
    """

    def __init__(self, batch: int, positions: int, device: torch.device, there: Iterable[Tensor]) -> None:
        super().__init__()
        self._primes, self._device = (batch, positions), device
        self._living = np.zeros(_SHAPE, np.int64)
        self._moments: set[bytes] = set()
        self._there = [x.untyped_storage() for x in there]
        self._known: dict[int, Any] = {storage._cdata: None for storage in self._there}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not _FILE:
            fresh = [self._count(x.untyped_storage()) for x in tree_leaves(result) if isinstance(x, Tensor) and x.device == self._device]
            if any(fresh):
                self._moments.add(self._living.tobytes())
        return result

    def moments(self) -> np.ndarray:
        """Bytes of one prompt of one token: [moment, outside or inside of pieces, power of batch, power of positions]."""
        return np.stack([np.frombuffer(moment, np.int64).reshape(_SHAPE) for moment in sorted(self._moments)])

    def _count(self, storage: torch.UntypedStorage) -> bool:
        """Take in a storage; whether it is a new one."""
        key = storage._cdata
        if key in self._known:
            return False
        size, powers = storage.nbytes(), list[int]()
        for prime, limit in zip(self._primes, _SHAPE[1:], strict=True):
            power = 0
            while size and size % prime == 0 and power < limit - 1:
                size, power = size // prime, power + 1
            powers.append(power)
        where = (int(in_piece()), *powers)

        def released(_: Any) -> None:
            del self._known[key]
            self._living[where] -= size

        self._known[key] = weakref.ref(storage, released)
        self._living[where] += size
        return True
