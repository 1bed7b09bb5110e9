"""A session: the rules, readers and leaves on the HookPoints of one model, put there together and taken off together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from transformer_lens.hook_points import HookPoint

from lens_relevance.errors import LivenessError, RelevanceError
from lens_relevance.hooked_model import HookedModel, root
from lens_relevance.hooks.checks import ForwardCheck
from lens_relevance.hooks.interrupts import protected, protected_contextmanager
from lens_relevance.hooks.model_state import check_forward, end_interrupted_calls
from lens_relevance.hooks.placed_dictionary import PlacedDictionary
from lens_relevance.hooks.placed_rule import PlacedRule
from lens_relevance.hooks.recomputation import Rebuilding
from lens_relevance.hooks.ruled_point import PointState, RuledHookPoint
from lens_relevance.hooks.substitution import Refusal, bypassed
from lens_relevance.hooks.written_point import WrittenPoint
from lens_relevance.rules.base import Rule
from lens_relevance.sites import Site


class Session:
    """Rules, taps and leaves on the HookPoints of one model; everything is undone by `close`."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.recording = False
        self._check: ForwardCheck | None = None
        self._compares_to_the_end = False
        self.placed: list[PlacedRule] = []
        self.dictionaries: list[PlacedDictionary | WrittenPoint] = []
        self._states: dict[HookPoint, PointState] = {}
        self._components: dict[nn.Module, list[PlacedRule]] = {}
        self._handles: list[Any] = []
        self._on_begin: list[Callable[[dict[str, Any]], None]] = []

    @protected
    def state(self, point: HookPoint) -> PointState:
        """The state of a HookPoint, exchanging its class at the first call."""
        if point not in self._states:
            if type(point) is not HookPoint:
                kind = (
                    "already carries rules; leave the inner attach or propagate"
                    if isinstance(point, RuledHookPoint)
                    else "is of a class of its own"
                )
                raise RelevanceError(f"HookPoint {point.name} {kind}: rules are attached to a model once at a time")
            self._states[point] = PointState(point)
            point.__dict__["_lens_relevance"] = self._states[point]
            point.__class__ = RuledHookPoint
        return self._states[point]

    def compare(self, check: ForwardCheck, *, part_by_part: bool = False) -> None:
        """Compare the next forwards with what the sites say, until one with a graph has been; part_by_part: to the end of the session."""
        self._check, self._compares_to_the_end = check, part_by_part
        for name, point in check.anatomy.points.items():
            if name not in check.anatomy.decorative and type(point) in (HookPoint, RuledHookPoint):
                self.state(point)

    def begin_part(self) -> None:
        """A part of the model is run by itself, on a graph of its own."""
        if self._check is not None:
            self._check.begin_part()

    def start_at(self, points: Sequence[HookPoint], rows: int) -> None:
        """Let the graph of a forward of so many rows start at these HookPoints."""
        for point in points:
            self.state(point).starts_graph = rows

    @protected
    def place(self, site: Site, rule: Rule) -> PlacedRule:
        """Put a rule on a site."""
        placed = PlacedRule(site, rule, self)
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
        return placed

    @protected
    def stand_in(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """A function in place of a module's method."""
        module.__dict__[name] = function
        self._handles.append(_StandIn(module, name))

    @protected
    def listen(self, site: Site) -> None:
        """Hand a site the call arguments of the module it asks for; recompute it where the model does not call its HookPoints."""
        for point in site.inner.points if site.inner is not None else ():
            self.state(point).inner = site.inner
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

    @protected
    def open(self) -> None:
        """Watch the beginning and the end of each forward of the wrapped model."""
        module = root(self.model)
        self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._handles.append(module.register_forward_hook(self._end))

    @protected
    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for point in list(self._states):
            self._restore(point)
        self._handles.clear()
        self._components.clear()
        self.placed.clear()
        for one in self.dictionaries:
            one.forget()
        self.dictionaries.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for one in (*self.placed, *self.dictionaries):
            one.reset()
        for state in self._states.values():
            state.started, state.check = False, None if self.recording else self._check
            if state.rebuilding is not None:
                state.rebuilding.check = state.check
        if self._check is not None:
            self._check.begin()
        check_forward(self.model, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A component returns: what it does with its input has to have passed the rules placed inside it."""
        placed_here = self._components[module]
        wanted = {placed.node: placed for placed in placed_here if placed.node is not None and placed.site.enabled(placed.rule)}
        for placed in placed_here:
            placed.node = None
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad), None)
        first = output[0] if isinstance(output, tuple) else output
        if not wanted or given is None or not isinstance(first, Tensor) or first.grad_fn is None:
            return
        source, missing = get_gradient_edge(given).node, set(wanted)
        ends = {source, *(at.node for at in self.dictionaries if isinstance(at, WrittenPoint) and at.node and not at.is_autoencoder)}
        found_source, seen, stack = False, {first.grad_fn}, [first.grad_fn]
        while stack and missing:
            node = stack.pop()
            missing.discard(node)
            found_source = found_source or node is source
            if node not in ends:  # below a transcoder lies what it stands for, which relevance does not pass
                fresh = [n for n, _ in node.next_functions if n is not None and n not in seen]
                seen.update(fresh)
                stack += fresh
        if missing and found_source:  # an intervention that cuts the component off from its input leaves nothing to pass
            decorative = wanted[missing.pop()]
            first.register_hook(Refusal(bypassed(decorative.site, decorative.rule)))

    def _end_comparing(self) -> None:
        """All that was to be compared has been: HookPoints that stood there for nothing else are as before."""
        self._check = None
        for point, state in list(self._states.items()):
            state.check = None
            if state.rebuilding is not None:
                state.rebuilding.check = None
            if not state.is_busy and state.rebuilt_by is None:
                self._restore(point)

    @protected
    def _restore(self, point: HookPoint) -> None:
        point.__class__ = HookPoint
        del point.__dict__["_lens_relevance"]
        del self._states[point]

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._check is not None and not self.recording:
            self._check.arrives(None, logits_of(output))
            if self._check.has_seen_graph and not self._compares_to_the_end:
                self._end_comparing()
        for placed in self.placed:
            if placed.site.output is None:
                output = _with_logits(output, placed.substitute)
        silent_leaves = [str(point.name) for point, state in self._states.items() if state.starts_graph and not state.started]
        if silent_leaves:
            raise LivenessError(
                f"{', '.join(silent_leaves)} did not fire in this forward, so nothing can be said of the embeddings, where relevance ends. "
                "Is the model called with token ids, and does its embedding have a HookPoint that fires?"
            )
        refuse_silent(self.placed)
        refuse_unread(self.dictionaries)
        return output


def refuse_unread(dictionaries: Sequence[PlacedDictionary | WrittenPoint]) -> None:
    """Raise LivenessError where dictionaries are on HookPoints that did not fire."""
    silent = [one for one in dictionaries if isinstance(one, WrittenPoint) and not one.fired]
    if silent:
        raise LivenessError(
            f"{', '.join(one.point for one in silent)} did not fire in this forward, so that the dictionaries there wrote nothing; name "
            "HookPoints that fire, such as a component's hook_out"
        )


def refuse_silent(placed: Sequence[PlacedRule]) -> None:
    """Raise LivenessError where a rule was placed on a site that did not fire."""
    silent = [p.site for p in placed if p.fired == 0 and p.site.enabled(p.rule)]
    if silent:
        raise LivenessError(
            f"{len(silent)} site(s) never fired in this forward, so their rules did nothing: "
            + "; ".join(f"{s.name} ({s.points})" for s in silent[:3])
            + ". Declare these sites at HookPoints that fire, or leave them out with strict=False"
        )


class _StandIn:
    """What stands in for a module's method, until `remove`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self._module, self._name = module, name

    def remove(self) -> None:
        del self._module.__dict__[self._name]


def logits_of(output: Any) -> Tensor:
    """The logits of what a model returned (a tensor, a tuple or an output object); without a head, its output."""
    return output if isinstance(output, Tensor) else output.logits if hasattr(output, "logits") else output[0]


def _with_logits(output: Any, substitute: Callable[[Tensor], Tensor]) -> Any:
    """What a model returned (a tensor, a tuple or an output object), with its logits substituted."""
    if isinstance(output, Tensor):
        return substitute(output)
    if isinstance(output, tuple):
        return (substitute(output[0]), *output[1:])
    output.logits = substitute(output.logits)
    return output


@protected_contextmanager
def session(model: HookedModel) -> Iterator[Session]:
    """A Session that is closed whatever happens."""
    opened = Session(model)
    try:
        opened.open()
        yield opened
    except Exception:
        raise
    except BaseException:  # KeyboardInterrupt; an ordinary exception cuts no clean-up
        end_interrupted_calls(model)
        raise
    finally:
        opened.close()
