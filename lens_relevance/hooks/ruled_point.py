"""The class of a HookPoint instance while rules or readers stand around its hooks.

A rule sits *outside* the hooks of a HookPoint: the output of its operation is substituted before any hook of the output HookPoint runs, and
the operation's inputs are captured after all hooks of the input HookPoints have run. So every reader, ours and TransformerLens's, whenever
registered, finds the right coefficient. To that end the class of a HookPoint instance is exchanged, while rules are attached, for one
whose `__call__` wraps the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lens_relevance.hooks.placed_rule import PlacedRule
from lens_relevance.hooks.recomputation import Rebuilding


class PointState:
    """What a ruled HookPoint does around its own hooks."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point
        self.starts_graph = 0  # rows of the forward whose graph starts here
        self.started = False
        self.silent = False  # what passes is not what the HookPoint stands for
        self.rebuilding: Rebuilding | None = None
        self.rebuilt_by: Rebuilding | None = None
        self.feeds: list[Rebuilding] = []
        self.replace: Callable[[Tensor], Tensor] | None = None
        self.output_of: list[PlacedRule] = []
        self.input_of: list[tuple[PlacedRule, int]] = []
        self.taps: list[Callable[[Tensor], Tensor | None]] = []

    @property
    def is_busy(self) -> bool:
        """Whether anything happens here, so that the HookPoint has to be called."""
        return bool(self.starts_graph or self.replace or self.taps or self.output_of or self.input_of or self.feeds or self.rebuilding)

    def before(self, x: Tensor) -> Tensor:
        if self.replace is not None:
            x = self.replace(x)
        if self.rebuilding is not None:
            x = self.rebuilding.run(x)
        if self.starts_graph:
            if x.shape[0] == 1 and self.starts_graph > 1:  # positions that the model broadcasts over the batch
                x = x.expand(self.starts_graph, *x.shape[1:])
            x = x.detach().requires_grad_(torch.is_grad_enabled())
            self.started = True
        for placed in self.output_of:
            if placed.active:
                x = placed.substitute(x)
        return x

    def after(self, x: Tensor) -> Tensor:
        for tap in self.taps:
            tapped = tap(x)
            x = x if tapped is None else tapped
        for rebuilding in self.feeds:
            rebuilding.feed(self.point, x)
        visits = [v for placed, i in self.input_of if placed.active and (v := placed.capture(i, x)) is not None]
        if not visits:
            return x
        marked = x.view_as(x)
        for visit in visits:
            marked.register_hook(visit.refuse_bypass)
        return marked


class RuledHookPoint(HookPoint):
    """The class of a HookPoint instance while something of ours stands around its hooks."""

    @property
    def is_tapped(self) -> bool:
        """Whether something of ours reads here."""
        return bool(self.__dict__["_lens_relevance"].taps)

    def has_hooks(self, dir: Literal["fwd", "bwd", "both"] = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """As for any HookPoint; what stands here counts as a forward hook, since models leave out HookPoints without hooks (Granite)."""
        state: PointState = self.__dict__["_lens_relevance"]
        return (dir != "bwd" and state.is_busy) or super().has_hooks(dir, including_permanent, level)

    def __call__(self, x: Any) -> Any:
        state: PointState = self.__dict__["_lens_relevance"]
        if state.silent or (state.rebuilt_by is not None and not state.rebuilt_by.running):
            return x  # what the model shows here once it has gone on without it
        given = state.before(x)
        passed = super().__call__(given)
        if state.rebuilt_by is not None:
            state.rebuilt_by.refuse_edit(self, given, passed)
        return state.after(passed)
