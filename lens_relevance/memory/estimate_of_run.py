"""What a run will take, from its footprint and what is free; whether it has to go block by block, or cannot go at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from torch import Tensor

from lens_relevance.blockwise import chain_of_blocks
from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, parameters_of, root
from lens_relevance.hooks.attention_by_rows import is_large
from lens_relevance.hooks.storage import IN_MEMORY
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.memory.footprint import Footprint, footprint, query_heads
from lens_relevance.memory.free_memory import free_bytes, free_for_files
from lens_relevance.memory.trial import Trial, trial
from lens_relevance.sites import Anatomy

GIB = 2**30
_MARGIN = 1.15  # an estimate is that near
_HELD_BACK = 1.3  # on a CPU the C library keeps some of what was freed, too
_COPIES = 12  # of each activation, that autograd, rules and result keep of each of two runs, at most


@dataclass(frozen=True)
class Work:
    """A run whose memory is asked for.

    Attributes:
        model: The model.
        anatomy: Its sites and HookPoints.
        run: The run on other token ids [batch, pos].
        key: What its memory depends on, besides its size.
        batch: Prompts in one pass.
        tokens: Positions of each.
        n: Reference runs of each prompt.
        forwards: Forward passes, the reference run's among them.
        backwards: Backward passes.
        in_files: The same run with all that it keeps in files, where what is more than `IN_MEMORY` may go to temporary ones.
    """

    model: HookedModel
    anatomy: Anatomy
    run: Callable[[Tensor], Any]
    key: Hashable
    batch: int
    tokens: int
    n: int = 1
    forwards: int = 1
    backwards: int = 1
    in_files: Work | None = None


class Estimate:
    """What a run on `batch` prompts of `tokens` tokens takes beside the loaded model, on the model's device.

    Attributes:
        tokens: Positions of each prompt.
        batch: Prompts in one pass.
        free_bytes: What is free there.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self.tokens, self.batch = work.tokens, work.batch
        self.free_bytes = free_bytes(device_of(work.model))

    @cached_property
    def plain_bytes(self) -> int:
        """Peak with the graph of the whole model."""
        return _peak(self._work, recompute=False)

    @cached_property
    def recompute_bytes(self) -> int | None:
        """Peak block by block (`recompute=True`); None for a model that is no chain of blocks.

        What is kept goes to temporary files where there is room for it (see lens_relevance.hooks.storage).
        """
        if not is_chain(self._work):
            return None
        peak = _peak(self._work, recompute=True)
        return peak - self._could_go_to_files if _MARGIN * self._could_go_to_files <= free_for_files() else peak

    @cached_property
    def _could_go_to_files(self) -> int:
        """Bytes that temporary files spare the memory, block by block."""
        peak = _peak(self._work, recompute=True)
        if self._work.in_files is None or peak <= IN_MEMORY:
            return 0
        return max(0, peak - _peak(self._work.in_files, recompute=True) - IN_MEMORY)

    @property
    def recompute(self) -> bool:
        """Whether the run goes block by block, unless told otherwise: where it would not fit with the graph of the whole model."""
        return not self._fits(self.plain_bytes) and self.recompute_bytes is not None and self.recompute_bytes < self.plain_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak of the run as it goes unless told otherwise."""
        return self.recompute_bytes if self.recompute and self.recompute_bytes is not None else self.plain_bytes

    @property
    def fits(self) -> bool:
        """Whether that fits, with a margin: of 15 % on a GPU, 30 % on a CPU, whose memory the C library hands back late."""
        return self._fits(self.peak_bytes)

    @property
    def forwards(self) -> int:
        """Forward passes, the reference run's and those of blocks that are run again among them."""
        return self._work.forwards * (2 if self.recompute else 1)

    @property
    def backwards(self) -> int:
        """Backward passes."""
        return self._work.backwards

    def __repr__(self) -> str:
        """One line."""
        how = "block by block" if self.recompute else "at once"
        passes = f"{self.forwards} forward and {self.backwards} backward passes"
        room = f"{self.free_bytes / GIB:.2f} GiB are free{'' if self.fits else ', which is too little'}"
        return f"Estimate({self.batch} x {self.tokens} tokens, {how}: {self.peak_bytes / GIB:.2f} GiB beside the model, {passes}; {room})"

    def to_frame(self) -> pd.DataFrame:
        """A row for each way: recompute, peak (GiB), fits, forwards, backwards."""
        ways = {False: self.plain_bytes, True: self.recompute_bytes}
        rows = [
            (way, peak / GIB, self._fits(peak), self._work.forwards * (1 + way), self.backwards)
            for way, peak in ways.items()
            if peak is not None
        ]
        return pd.DataFrame(rows, columns=["recompute", "peak", "fits", "forwards", "backwards"])

    def refuse(self, recompute: bool) -> None:
        """Raise RelevanceError for a run that cannot fit."""
        peak = self.recompute_bytes if recompute else self.plain_bytes
        if peak is None or peak <= _MARGIN * self.free_bytes:
            return
        remedies = ["shorter prompts", "fewer HookPoints (names_filter=)", "what is kept in a folder (device=Path(...))"]
        if recompute and _MARGIN * self._could_go_to_files > free_for_files():
            remedies.append("a folder for temporary files that has more room and lies on a disk (TMPDIR)")
        if self.batch > 1:
            remedies.insert(0, "fewer prompts at once")
        if not recompute and self.recompute_bytes is not None:
            remedies.insert(0, f"recompute=True ({self.recompute_bytes / GIB:.1f} GiB)")
        raise RelevanceError(
            f"this run ({self.batch} x {self.tokens} tokens) would take about {peak / GIB:.1f} GiB beside the model, and "
            f"{self.free_bytes / GIB:.1f} GiB are free; what helps: {', '.join(remedies)}"
        )

    def _fits(self, peak: int) -> bool:
        on_cpu = device_of(self._work.model).type == "cpu"
        return peak * (_HELD_BACK if on_cpu else _MARGIN) <= self.free_bytes


def block_by_block(work: Work, prompt: Prompt, recompute: bool | None) -> bool:
    """Whether a run is to go block by block; None: where it does not fit otherwise.

    Nothing is tried for what surely fits, for inputs that are not plain token ids, and where hooks of the user's would see the trial.

    Raises:
        RelevanceError: It cannot fit.
    """
    way = trial()
    if way is not None:
        return way.recompute
    if surely_fits(work) or prompt.arguments or _is_edited(work.anatomy) or _is_spread(work.model):
        return bool(recompute)
    found = Estimate(work)
    try:
        chosen = found.recompute if recompute is None else recompute
        _ = found.recompute_bytes if chosen else found.plain_bytes
    except RelevanceError:  # the trial's, of which nothing is known of the run itself
        return bool(recompute)
    found.refuse(chosen)
    return chosen


def surely_fits(work: Work) -> bool:
    """Whether a run is so small, by a generous bound, that nothing need be tried."""
    parameters = [p for p in parameters_of(root(work.model)) if p.ndim > 1]
    vocabulary = int(getattr(getattr(work.model, "cfg", None), "d_vocab", 0) or 0)
    width = sum(size for p in parameters for size in p.shape if size != vocabulary)
    layers = 1 + max((site.layer or 0 for site in work.anatomy.sites), default=0)
    per_prompt = work.tokens * (width + query_heads(work.anatomy) * layers * work.tokens) + vocabulary
    largest = max((p.element_size() for p in parameters), default=4)
    return 2 * _COPIES * work.batch * work.n * per_prompt * largest <= free_bytes(device_of(work.model)) / 2


def is_chain(work: Work) -> bool:
    """Whether the model can be run block by block."""
    try:
        return bool(chain_of_blocks(work.model, work.anatomy))
    except RelevanceError:
        return False


_FOOTPRINTS: WeakKeyDictionary[Any, dict[Hashable, Footprint]] = WeakKeyDictionary()


def _peak(work: Work, *, recompute: bool) -> int:
    way = Trial(recompute, recompute and is_large(work.batch * work.n, query_heads(work.anatomy), work.tokens))
    known = _FOOTPRINTS.setdefault(work.model, {})
    if (work.key, way) not in known:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the trial's prompts
            known[work.key, way] = footprint(work.model, work.run, way, n=work.n)
    return known[work.key, way].peak(work.batch, work.tokens)


def device_of(model: HookedModel) -> torch.device:
    """The device of a model's first parameter."""
    return next(iter(root(model).parameters())).device


def _is_edited(body: Anatomy) -> bool:
    return any(point.has_hooks() for point in body.points.values())


def _is_spread(model: HookedModel) -> bool:
    return len({parameter.device for parameter in root(model).parameters()}) > 1
