"""The processes that share a run: one by default, several under `accelerate launch` or torchrun.

    accelerate launch --multi_gpu --num_processes 4 --no_python lens-relevance rank heads --model gpt2 --pairs pairs.jsonl

Where there are no GPUs this starts processes on CPUs; `accelerate launch --cpu` would start a single one, unless it has MPI.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from analyses.tasks import PromptPairs

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all that work on a run.

    Attributes:
        index: its number, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    def share(self, pairs: PromptPairs) -> tuple[PromptPairs, int]:
        """The consecutive rows that are this process's to do, and the number of the first; all pairs are in exactly one share."""
        first, end = (len(pairs) * i // self.count for i in (self.index, self.index + 1))
        return pairs[first:end], first

    def gather(self, part: T) -> list[T]:
        """What every process has, in their order, in every process. All of them must call it."""
        if self.count == 1:
            return [part]
        parts: list[T | None] = [None] * self.count
        distributed.all_gather_object(parts, part)
        return parts  # type: ignore[return-value]  # filled in by now


def processes() -> Processes:
    """The processes this one was launched with, brought in touch with each other; on its own, (0, 1).

    Call it before a model is loaded: it gives each process its own device.
    """
    if distributed.is_available() and not distributed.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _connect()
    if not (distributed.is_available() and distributed.is_initialized()):
        return Processes()
    return Processes(distributed.get_rank(), distributed.get_world_size())


def _connect() -> None:
    from accelerate import PartialState  # type: ignore[import-untyped]  # slow to import, and needed only here

    # Without being told, accelerate leaves processes on CPUs alone: each would do all the work.
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") or not torch.cuda.is_available()
    # One process may wait long for the others: their rows can be longer, their machines slower.
    state = PartialState(cpu=cpu, timeout=timedelta(days=7))
    atexit.register(state.destroy_process_group)
