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

from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.checks import ForwardCheck
from lens_relevance.hooks.placed_dictionary import PlacedDictionary
from lens_relevance.hooks.placed_rule import PlacedRule
from lens_relevance.hooks.recomputation import Rebuilding
from lens_relevance.hooks.written_point import WrittenPoint
from lens_relevance.sites.base import InnerPoints


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
        self.written: WrittenPoint | None = None
        self.read_by: list[PlacedDictionary] = []
        self.taps: list[Callable[[Tensor], Tensor | None]] = []
        self.taps_before_hooks: list[Callable[[Tensor], Tensor | None]] = []
        self.check: ForwardCheck | None = None
        self.inner: InnerPoints | None = None
        self.is_decorative = False

    @property
    def is_busy(self) -> bool:
        """Whether anything happens here, so that the HookPoint has to be called."""
        return bool(
            self.starts_graph
            or self.replace
            or self.taps
            or self.taps_before_hooks
            or self.output_of
            or self.input_of
            or self.written
            or self.read_by
            or self.feeds
            or self.rebuilding
        )

    def before(self, x: Tensor) -> Tensor:
        if self.replace is not None:
            x = self.replace(x)
        if self.rebuilding is not None:
            x = self.rebuilding.run(x)
        if self.starts_graph:
            x = x.unsqueeze(0) if x.ndim == 2 else x
            if x.shape[0] == 1:  # positions that the model broadcasts over the batch, [pos, d_model] or [1, pos, d_model]
                x = x.expand(self.starts_graph, *x.shape[1:])
            x = x.detach().requires_grad_(torch.is_grad_enabled())
            self.started = True
        for placed in self.output_of:
            if placed.active:
                x = placed.substitute(x)
        if self.written is not None:
            x = self.written.write(x)
        return _tapped(x, self.taps_before_hooks)

    def after(self, x: Tensor) -> Tensor:
        x = _tapped(x, self.taps)
        for rebuilding in self.feeds:
            rebuilding.feed(self.point, x)
        for dictionary in self.read_by:
            dictionary.read(x)
        visits = [v for placed, i in self.input_of if placed.active and (v := placed.capture(i, x)) is not None]
        if not visits:
            return x
        marked = x.view_as(x)
        for visit in visits:
            marked.register_hook(visit.refuse_bypass)
        return marked


def _tapped(x: Tensor, taps: list[Callable[[Tensor], Tensor | None]]) -> Tensor:
    """What readers leave of a tensor: the same values, as a view of its own where they need one."""
    for tap in taps:
        tapped = tap(x)
        x = x if tapped is None else tapped
    return x


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
        if state.is_decorative:
            return _unedited(self, x, super().__call__(x))
        check = state.check if isinstance(x, Tensor) and x.is_floating_point() else None
        if check is not None:
            check.arrives(self, x, is_cut=bool(state.starts_graph))
        given = state.before(x)
        entered = None if check is None else check.enters(self, given)
        passed = super().__call__(given)
        if state.rebuilt_by is not None:
            state.rebuilt_by.refuse_edit(self, given, passed)
        if state.inner is not None:
            state.inner.note(self, passed is not given)
        if isinstance(passed, Tensor) and torch.is_grad_enabled() and given.requires_grad and not passed.requires_grad:
            passed = ConstantAfter.apply(given, passed)
        left = state.after(passed)
        if check is not None:
            left = check.leaves(self, left, entered)
        if state.inner is not None and state.inner.passes_by() and not state.inner.is_edited:
            return x  # by the tensor's identity the model knows that nothing was edited
        return left


def _unedited(point: HookPoint, given: Any, passed: Any) -> Any:
    """What a decorative HookPoint returns, if no hook edits it."""
    if passed is not given:
        raise RelevanceError(
            f"a hook edits {point.name}, which is decorative on this model: it fires on another tensor than its name says, or the edit is "
            "thrown away. Edit the component's hook_in or hook_out instead"
        )
    return passed


class ConstantAfter(torch.autograd.Function):
    """A constant that a hook returned, on the graph of what it was given, to which nothing flows back.

    So what comes after it has coefficients all the same, and where it stands can be seen in the graph.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, constant: Tensor) -> Tensor:
        return constant.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        return None, None
