"""Puts rules on HookPoints and takes them off again.

A rule sits *outside* the hooks of a HookPoint: the output of its operation is substituted before any hook of the output HookPoint runs, and
the operation's inputs are captured after all hooks of the input HookPoints have. So every reader, ours and TransformerLens's, whenever
registered, finds the right coefficient. To that end the class of a HookPoint instance is exchanged, while rules are attached, for one
whose `__call__` wraps the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from transformer_lens.hook_points import HookPoint

from lens_relevance.errors import LivenessError, RelevanceError
from lens_relevance.guest import check_forward, root
from lens_relevance.rebuilding import Rebuilding
from lens_relevance.rules.base import Reference, Rule
from lens_relevance.sites import Site
from lens_relevance.visits import Refusal, Substitute, Visit, bypassed


class _Placed:
    """A rule placed on a site, with what is in flight between its input and output HookPoints."""

    def __init__(self, site: Site, rule: Rule, session: Session) -> None:
        self.site, self.rule, self.session = site, rule, session
        self.visit: Visit | None = None
        self.captured: dict[int, Tensor] = {}
        self.fired = 0
        self.node: Node | None = None
        self.recorded: list[Reference] = []

    @property
    def active(self) -> bool:
        """A reference run is recorded for every form of a site: which one the run itself will use is not known yet."""
        return self.session.recording or self.site.enabled()

    def reset(self) -> None:
        self.visit, self.captured, self.fired, self.node = None, {}, 0, None

    def capture(self, index: int, x: Tensor) -> Visit | None:
        """Take an input; gives the visit that a marker on it has to tell, if one is needed."""
        if index in self.captured:
            raise LivenessError(
                f"{self.site.inputs[index].name} fired twice before {self.site.output_name} did, so the rule at {self.site.name} "
                "cannot tell which call it belongs to; declare a site per call, or leave it out with strict=False"
            )
        self.captured[index] = x
        if self.session.recording or not (torch.is_grad_enabled() and x.requires_grad):
            return None
        self.visit = self.visit or Visit(self.site, self.rule)
        return self.visit

    def substitute(self, output: Tensor) -> Tensor:
        inputs, visit = self.captured, self.visit
        self.captured, self.visit = {}, None
        self.fired += 1
        if len(inputs) < len(self.site.inputs):
            missing = [str(p.name) for i, p in enumerate(self.site.inputs) if i not in inputs]
            raise LivenessError(
                f"{self.site.output_name} fired without {', '.join(missing)}, so the rule at {self.site.name} has no inputs"
            )
        ordered = tuple(inputs[i] for i in range(len(self.site.inputs)))
        if self.session.recording:
            if self.rule.needs_reference:
                self.recorded.append(Reference(tuple(x.detach() for x in ordered), output.detach()))
            return output
        if visit is None:  # nothing differentiable comes in
            return output
        if self.rule.on_output:
            ruled: Tensor = Substitute.apply(visit, None, output)
        else:
            ruled = Substitute.apply(visit, self._reference(ordered), output.detach(), *ordered)
        self.node = ruled.grad_fn
        return ruled

    def _reference(self, inputs: tuple[Tensor, ...]) -> Reference | None:
        if not self.rule.needs_reference:
            return None
        if len(self.recorded) < self.fired:
            raise RelevanceError(
                f"the reference run did not pass {self.site.name}; give attach or propagate a reference that runs the whole model"
            )
        reference = self.recorded[self.fired - 1]
        for mine, its in zip(inputs, reference.inputs, strict=True):
            if mine.shape[-2:] != its.shape[-2:] or mine.shape[0] % its.shape[0]:
                raise RelevanceError(
                    f"the run and its reference differ in shape at {self.site.name} ({tuple(mine.shape)} against {tuple(its.shape)}); "
                    "pass a reference of the same number of tokens and rows"
                )
        return reference


class _PointState:
    """What a ruled HookPoint does around its own hooks."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point
        self.starts_graph = 0  # rows of the forward whose graph starts here
        self.rebuilding: Rebuilding | None = None
        self.rebuilt_by: Rebuilding | None = None
        self.feeds: list[Rebuilding] = []
        self.replace: Callable[[Tensor], Tensor] | None = None
        self.output_of: list[_Placed] = []
        self.input_of: list[tuple[_Placed, int]] = []
        self.taps: list[Callable[[Tensor], Tensor | None]] = []

    def before(self, x: Tensor) -> Tensor:
        if self.replace is not None:
            x = self.replace(x)
        if self.rebuilding is not None:
            x = self.rebuilding.run(x)
        if self.starts_graph:
            if x.shape[0] == 1 and self.starts_graph > 1:  # positions that the model broadcasts over the batch
                x = x.expand(self.starts_graph, *x.shape[1:])
            x = x.detach().requires_grad_(torch.is_grad_enabled())
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

    def __call__(self, x: Any) -> Any:
        state: _PointState = self.__dict__["_lens_relevance"]
        if state.rebuilt_by is not None and not state.rebuilt_by.running:
            return x  # what the model shows here once it has gone on without it
        given = state.before(x)
        passed = super().__call__(given)
        if state.rebuilt_by is not None:
            state.rebuilt_by.refuse_edit(self, given, passed)
        return state.after(passed)


class Session:
    """Rules, taps and leaves on the HookPoints of one model; everything is undone by `close`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.recording = False
        self.placed: list[_Placed] = []
        self._states: dict[HookPoint, _PointState] = {}
        self._components: dict[nn.Module, list[_Placed]] = {}
        self._handles: list[Any] = []
        self._on_begin: list[Callable[[dict[str, Any]], None]] = []

    def state(self, point: HookPoint) -> _PointState:
        """The state of a HookPoint, exchanging its class at the first call."""
        if point not in self._states:
            if type(point) is not HookPoint:
                kind = (
                    "already carries rules; leave the inner attach or propagate"
                    if isinstance(point, RuledHookPoint)
                    else "is of a class of its own"
                )
                raise RelevanceError(f"HookPoint {point.name} {kind}: rules are attached to a model once at a time")
            self._states[point] = _PointState(point)
            point.__dict__["_lens_relevance"] = self._states[point]
            point.__class__ = RuledHookPoint
        return self._states[point]

    def place(self, site: Site, rule: Rule) -> None:
        """Put a rule on a site."""
        placed = _Placed(site, rule, self)
        self.placed.append(placed)
        if site.output is not None:
            self.state(site.output).output_of.append(placed)
        for index, point in enumerate(site.inputs):
            self.state(point).input_of.append((placed, index))
        self.listen(site)
        if site.component is not None:
            if site.component not in self._components:
                self._components[site.component] = []
                self._handles.append(site.component.register_forward_hook(self._leave, with_kwargs=True))
            self._components[site.component].append(placed)

    def listen(self, site: Site) -> None:
        """Hand a site the call arguments of the module it asks for; recompute it where the model does so behind closed doors."""
        if site.rebuilt is not None:
            at = self.state(site.rebuilt)
            at.rebuilding = at.rebuilding or Rebuilding()
            at.rebuilding.add(site)
            for point in site.inputs:
                if at.rebuilding not in self.state(point).feeds:
                    self.state(point).feeds.append(at.rebuilding)
            if site.output is not None and site.output is not site.rebuilt:
                self.state(site.output).rebuilt_by = at.rebuilding
        if site.caller is not None and site.on_call is not None:
            on_call = site.on_call
            self._handles.append(site.caller.register_forward_pre_hook(lambda _, a, k: on_call(a, k), with_kwargs=True))

    def open(self) -> None:
        """Watch the beginning and the end of each forward of the wrapped model."""
        module = root(self.model)
        self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._end))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for point in self._states:
            point.__class__ = HookPoint
            del point.__dict__["_lens_relevance"]
        self._handles.clear()
        self._states.clear()
        self._components.clear()
        self.placed.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for placed in self.placed:
            placed.reset()
        check_forward(self.model, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A component returns: what it does with its input has to have passed the rules placed inside it."""
        wanted = {placed.node: placed for placed in self._components[module] if placed.node is not None}
        for placed in wanted.values():
            placed.node = None
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad), None)
        first = output[0] if isinstance(output, tuple) else output
        if not wanted or given is None or not isinstance(first, Tensor) or first.grad_fn is None:
            return
        source, missing = get_gradient_edge(given).node, set(wanted)
        found_source, seen, stack = False, {first.grad_fn}, [first.grad_fn]
        while stack and missing:
            node = stack.pop()
            missing.discard(node)
            found_source = found_source or node is source
            if node is not source:
                fresh = [n for n, _ in node.next_functions if n is not None and n not in seen]
                seen.update(fresh)
                stack += fresh
        if missing and found_source:  # an intervention that cuts the component off from its input leaves nothing to pass
            decorative = wanted[missing.pop()]
            first.register_hook(Refusal(bypassed(decorative.site, decorative.rule)))

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        for placed in self.placed:
            if placed.site.output is None:
                output = _with_logits(output, placed.substitute)
        silent = [p.site for p in self.placed if p.fired == 0 and p.site.enabled()]
        if silent:
            raise LivenessError(
                f"{len(silent)} site(s) never fired in this forward, so their rules did nothing: "
                + "; ".join(f"{s.name} ({s.points})" for s in silent[:3])
                + ". Declare these sites at HookPoints that fire, or leave them out with strict=False"
            )
        return output


def _with_logits(output: Any, substitute: Callable[[Tensor], Tensor]) -> Any:
    """What a model returned (a tensor, a tuple or an output object), with its logits substituted."""
    if isinstance(output, Tensor):
        return substitute(output)
    if isinstance(output, tuple):
        return (substitute(output[0]), *output[1:])
    output.logits = substitute(output.logits)
    return output


@contextmanager
def session(model: Any) -> Iterator[Session]:
    """A Session that is closed whatever happens."""
    opened = Session(model)
    try:
        opened.open()
        yield opened
    finally:
        opened.close()
