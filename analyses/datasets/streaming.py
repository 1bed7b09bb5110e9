"""One way through a data set: batch after batch, shared among processes, and resumed from a checkpoint where it was interrupted.

Under `accelerate launch script.py` (or torchrun) each process takes consecutive rows, and all of them get the whole result, so that a
script runs unchanged. Results of several processes equal those of one up to rounding; a resumed run equals an uninterrupted one bit by
bit, because what a batch adds does not depend on what ran before it in the same process.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from analyses.datasets.checkpoint import Checkpoint
from analyses.datasets.fingerprint import fingerprint
from analyses.datasets.processes import processes
from analyses.datasets.progress import progress_bar
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError
from lens_relevance.hooked_model import HookedModel

_DONE, _SECONDS = "rows_done", "seconds"


@runtime_checkable
class Running(Protocol):
    """Sums over pairs that grow batch by batch, and can be written down and put together."""

    def add(self, scores: Tensor) -> None:
        """Take in the scores of a batch."""

    def state(self) -> dict[str, Tensor]:
        """All there is to know, as tensors; empty before the first batch."""

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in what another one has seen. Into one that has seen nothing, this is an exact copy."""


R = TypeVar("R", bound=Running)


class PairStream:
    """The pairs of one run, batch by batch.

    Args:
        size: pairs per batch.
        checkpoint: a folder for what is done so far; a run that was interrupted goes on from there, one that was completed is read from
            there.
        settings: everything else that the results depend on (analysis, method, ...), as JSON can hold it.

    Raises:
        RelevanceError: there are no pairs, or the checkpoint is one of another run.
    """

    def __init__(self, model: HookedModel, pairs: PromptPairs, size: int, *, checkpoint: str | Path | None = None, **settings: Any) -> None:
        if not len(pairs):
            raise RelevanceError("there are no pairs to go through")
        if size < 1:
            raise RelevanceError(f"a batch has at least one row, got size {size}")
        self.processes = processes()
        self.pairs, self.first = self.processes.share(pairs)
        self.size = size
        self.checkpoint = None
        if checkpoint is not None:
            run = fingerprint(model, {"pairs": pairs}, size, **settings, batch_size=size, processes=self.processes.count)
            self.checkpoint = Checkpoint(checkpoint, run)

    def fold(self, new: Callable[[], R], step: Callable[[PromptPairs], Tensor], description: str, *, name: str = "sums") -> R:
        """A `new()`, after it has taken in what `step` makes of every batch of every process; nothing is kept per pair.

        Args:
            description: beside the progress bar.
            name: by which the checkpoint knows these sums; another one for each fold of a run.
        """
        mine, name, done = new(), f"{name}-{self.processes.index}", 0
        if (saved := self._load(name)) is not None:
            done = int(saved.pop(_DONE))
            mine.merge(saved)
        for start, batch in self._batches(self.size, description, done):
            mine.add(step(batch))
            self._save(name, {**mine.state(), _DONE: torch.tensor(start + len(batch))})
        if self.processes.count == 1:
            return mine
        whole = new()
        for state in self.processes.gather(mine.state()):
            if state:  # there can be more processes than pairs
                whole.merge(state)
        return whole

    def collect(
        self, name: str, step: Callable[[PromptPairs], dict[str, Tensor]], description: str, *, size: int | None = None
    ) -> tuple[dict[str, Tensor], float]:
        """What `step` makes of every batch, of all processes in order.

        Args:
            name: by which the checkpoint knows these results.
            description: beside the progress bar.
            size: another batch size.

        Returns:
            Tensors [pair, ...] by name, and the seconds this took: those of the slowest process, with those from before an interruption.
        """
        parts = []
        for start, batch in self._batches(size or self.size, description):
            part = f"{re.sub(r'[^0-9A-Za-z]+', '_', name)}-{self.first + start}"
            if (results := self._load(part)) is None:
                began = time.perf_counter()
                results = {key: values.detach().double().cpu() for key, values in step(batch).items()}
                results[_SECONDS] = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
                self._save(part, results)
            parts.append(results)
        everyone = self.processes.gather(parts)
        seconds = max(float(sum(part[_SECONDS] for part in mine)) for mine in everyone)
        whole = [part for mine in everyone for part in mine]
        return {key: torch.cat([part[key] for part in whole]) for key in whole[0] if key != _SECONDS}, seconds

    def _batches(self, size: int, description: str, start: int = 0) -> Iterator[tuple[int, PromptPairs]]:
        """Batches of this process from row `start` of its share on, with the row that each begins with."""
        starts = range(start, len(self.pairs), size)
        with progress_bar() as bar:
            for row in bar.track(starts, description=description):
                yield row, self.pairs[row : row + size]

    def _load(self, name: str) -> dict[str, Tensor] | None:
        return None if self.checkpoint is None else self.checkpoint.load(name)

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        if self.checkpoint is not None:
            self.checkpoint.save(name, tensors)
