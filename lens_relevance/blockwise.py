"""One run block by block, for long contexts: the memory of one block instead of that of all.

The forward keeps what each block is called with, and no graph inside the blocks. The backward runs the blocks again, one at a time from the
last to the first, each with its rules and its graph on the input that was kept (under pair rules on the reference run's input, too), reads
what was asked for at the block's HookPoints, and frees it. Embeddings, the last block and what follows it have their graph from the start.
The same operations run in the same order as in a run at once, so that the result is the same bit by bit. The exception is attention whose
scores are large (hooks/attention_by_rows.py): it is computed for some query rows at a time, and sums over queries are then rounded in
another order.

A block is run again with everything that stands on it: hooks edit it as they did in the forward. A hook that acts differently at its second
call, or that hands tensors from one block to another with their graph, is beyond this; the first is noticed and refused, where it changes
what the block returns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache

from lens_relevance.errors import RelevanceError
from lens_relevance.forward import Run, replaced_embeddings
from lens_relevance.hooked_model import HookedModel, is_bridge
from lens_relevance.hooks.conditional import AnyCondition, backward_through
from lens_relevance.hooks.interrupts import protected_contextmanager
from lens_relevance.hooks.recording import Part, Taps
from lens_relevance.hooks.session import Session, refuse_silent, refuse_unread
from lens_relevance.hooks.storage import Storage
from lens_relevance.inputs.references import ReferenceRun
from lens_relevance.memory.free_memory import hand_back
from lens_relevance.sites import Anatomy

_LARGE = 2**22  # bytes that blocks hand on, from which on freed memory is handed back: it takes a few milliseconds
_INPUT = ""  # a block's own input among the tensors of its HookPoints


@dataclass
class _Call:
    """What a block was called with; hidden: its input, without a graph, where it is kept; device: where the block had it."""

    hidden: Tensor
    device: torch.device
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments with this tensor as the block's input.

        A cache stays empty: each call gets a copy of its own. It would keep every block's keys and values, and hold them already when the
        block is run again. Without any cache, keys would lie otherwise in memory and be multiplied in another order.
        """
        args, kwargs = _with_hidden(self.args, self.kwargs, hidden)
        return tuple(_own_cache(x) for x in args), {name: _own_cache(x) for name, x in kwargs.items()}


@dataclass
class _Pass:
    """One forward: the calls of its blocks, and which HookPoints fired before and within them."""

    calls: list[_Call] = field(default_factory=list)
    start: Tensor | None = None  # the first block's input, with its graph
    leaf: Tensor | None = None  # the last block's input, where the graph of the upper part starts
    handed_on: Tensor | None = None
    below: set[str] = field(default_factory=set)
    within: set[str] = field(default_factory=set)
    point_in: int | None = None  # the part in which the target's HookPoint fired: -1 the embeddings, else the index of the block


class Blockwise:
    """The forwards and the backward of one `propagate`, block by block.

    storage: where the inputs of the blocks are kept. point: the HookPoint that a latent target is read at. other: the reference run.

    Raises RelevanceError for a model that is not one chain of blocks.
    """

    def __init__(
        self,
        model: HookedModel,
        opened: Session,
        anatomy: Anatomy,
        taps: Taps,
        *,
        storage: Storage,
        point: str | None = None,
        other: ReferenceRun | None = None,
    ) -> None:
        self.blocks = chain_of_blocks(model, anatomy)
        self._opened, self._anatomy, self._taps, self._point, self._other = opened, anatomy, taps, point, other
        self._placed = [[p for p in opened.placed if p.site.layer == i] for i in range(len(self.blocks))]
        self._dictionaries = [[d for d in opened.dictionaries if d.layer == i] for i in range(len(self.blocks))]
        self._storage, self._hands_back = storage, False
        self._own, self._reference = _Pass(), _Pass()

    @protected_contextmanager
    def forward(self, *, reference: bool = False) -> Iterator[None]:
        """Around one forward: what the blocks are called with is kept, and of their inside nothing."""
        run = self._reference if reference else self._own
        self._taps.fired.clear()
        handles = []
        for i, block in enumerate(self.blocks):
            # In front of the user's own hooks: these act again when the block is run again.
            handles.append(block.register_forward_pre_hook(partial(self._enter, run, i, reference), prepend=True, with_kwargs=True))
            handles.append(block.register_forward_hook(partial(self._leave, run)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._taps.only = None
        if len(run.calls) != len(self.blocks):
            raise RelevanceError(f"{len(run.calls)} of {len(self.blocks)} blocks ran in this forward; recompute=True needs all of them")

    def _enter(
        self, run: _Pass, index: int, reference: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = _hidden(args, kwargs)
        if index != len(run.calls) or (index and hidden is not run.handed_on):
            raise RelevanceError(
                f"blocks.{index} is not called once, with what blocks.{index - 1} returns, so that the model is no chain of blocks; "
                "leave out recompute=True"
            )
        given = [*enumerate(args), *kwargs.items()]
        beside = [name for name, x in given if isinstance(x, Tensor) and x is not hidden and x.requires_grad]
        if beside:
            raise RelevanceError(
                f"blocks.{index} is handed the argument {beside[0]}, through which relevance flows beside the residual stream; "
                "leave out recompute=True"
            )
        if self._point is not None and run.point_in is None and self._point in self._taps.fired:
            run.point_in = index - 1
        if index == 0:
            run.start, run.below = hidden, set(self._taps.fired)
            self._opened.recording = False
            self._taps.only = {self._point} if self._point is not None else set()
            torch.set_grad_enabled(False)  # the context that propagate runs in puts it back
        call = _Call(self._storage.keep(hidden), hidden.device, *_with_hidden(args, kwargs, None))
        run.calls.append(call)
        if index == len(self.blocks) - 1:
            run.within = set(self._taps.fired) - run.below
            self._opened.recording = reference
            self._taps.only = None
            torch.set_grad_enabled(not reference)
            hidden = run.leaf = hidden.detach().requires_grad_(not reference)
            if not reference:
                self._share_masks()
        return call.arguments(hidden)

    def _leave(self, run: _Pass, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run.handed_on = _first(output)
        self._hands_back = run.handed_on.device.type == "cpu" and run.handed_on.nbytes >= _LARGE
        _drop_pattern(module)

    def _share_masks(self) -> None:
        """Masks of the two runs are mostly equal: one of each is enough."""
        same: dict[int, Tensor] = {}
        for mine, its in zip(self._own.calls, self._reference.calls, strict=False):
            for name, value in its.kwargs.items():
                own = mine.kwargs.get(name)
                if isinstance(value, Tensor) and isinstance(own, Tensor) and value.shape == own.shape:
                    if id(value) not in same:
                        same[id(value)] = own if torch.equal(value, own) else value
                    its.kwargs[name] = same[id(value)]

    def backward(self, run: Run, before: Run | None, seed: Tensor, *, conditions: Sequence[AnyCondition]) -> Iterator[Part]:
        """Coefficients from `seed` at the target's root down to the embeddings, part by part."""
        if self._hands_back:
            hand_back()
        own, conditions = self._own, list(conditions)
        assert own.leaf is not None and own.start is not None
        above = {name: x for name, x in run.tensors.items() if name not in own.below | own.within}
        below = {name: x for name, x in run.tensors.items() if name in own.below}
        others = {} if before is None else before.tensors
        run.tensors = {}  # or the upper part's graph would stay until the end
        upstream: Tensor | None = None
        started = self._point is None or own.point_in is None
        if started:
            part, upstream = _pull_back(run.root, seed, own.leaf, tensors=above, references=others, conditions=conditions)
            yield part
            del part
        del above
        root = run.root
        own.leaf, run.root, run.logits = None, run.root.detach(), run.logits.detach()
        for placed in (*self._placed[-1], *self._dictionaries[-1]):
            placed.forget()
        for index in reversed(range(len(self.blocks) - 1)):
            if started or own.point_in == index:
                references = {} if before is None else self._again(self._reference, index, graph=False)[2]
                leaf, output, tensors = self._again(own, index, graph=True)
                if not started:
                    output, upstream, started = self._taps.convert(str(self._point), tensors[str(self._point)]), seed, True
                part, upstream = _pull_back(output, upstream, leaf, tensors=tensors, references=references, conditions=conditions)
                del leaf, output, tensors, references
                for placed in self._placed[index]:
                    placed.forget()
                yield part
                del part
                for dictionary in self._dictionaries[index]:  # until then the part's coefficients are read with their features
                    dictionary.forget()
                if self._hands_back:
                    hand_back()
            del own.calls[index + 1 :], self._reference.calls[index + 1 :]
        last, arriving = (own.start, upstream) if started else (root, seed)
        yield _pull_back(last, arriving, None, tensors=below, references=others, conditions=conditions)[0]
        if conditions:
            raise RelevanceError(f"through: {', '.join(c.name for c in conditions)} did not fire, or is not live, in this forward")

    def _again(self, run: _Pass, index: int, *, graph: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run a block once more on the input that was kept. Gives its input, its output and the tensors at its HookPoints."""
        call, reference = run.calls[index], run is self._reference
        for placed in (*self._placed[index], *self._dictionaries[index]):
            placed.reset()
        leaf = call.hidden.to(call.device).requires_grad_(graph)
        replaced = replaced_embeddings(self._opened, self._anatomy, self._other) if reference and self._other else nullcontext()
        self._opened.recording = reference
        self._opened.begin_part()
        with torch.set_grad_enabled(graph), replaced:
            args, kwargs = call.arguments(leaf)
            output = _first(self.blocks[index](*args, **kwargs))
        _drop_pattern(self.blocks[index])
        self._opened.recording = False
        refuse_silent(self._placed[index])
        refuse_unread(self._dictionaries[index])
        handed_on = run.calls[index + 1].hidden.to(output.device)
        if not torch.allclose(output.detach(), handed_on, rtol=0, atol=0, equal_nan=True):
            raise RelevanceError(
                f"blocks.{index} gave another value when it was run again, so that recompute=True would be wrong: a hook on it acts "
                "differently at its second call, or the device computes differently from call to call"
            )
        return leaf, output, self._taps.take()


def chain_of_blocks(model: HookedModel, anatomy: Anatomy) -> list[nn.Module]:
    """The blocks of a model that runs one after the other; raises RelevanceError for any other model."""
    blocks = list(getattr(model, "blocks", [])) if is_bridge(model) else []
    if not blocks or len(anatomy.stacks.roles) != 1:
        raise RelevanceError(
            "recompute=True runs one chain of blocks again, block by block, and this model "
            + (f"has the stacks {', '.join(anatomy.stacks.roles)}" if len(anatomy.stacks.roles) > 1 else "has no `blocks` of a bridge")
            + "; leave it out"
        )
    return blocks


def _pull_back(
    root: Tensor,
    seed: Tensor | None,
    leaf: Tensor | None,
    *,
    tensors: dict[str, Tensor],
    references: Mapping[str, Tensor],
    conditions: list[AnyCondition],
) -> tuple[Part, Tensor | None]:
    """The part below `root`, and the coefficient that arrives at its leaf. Conditions that are met are taken off the list."""
    here = [c for c in conditions if c.name in tensors]
    for condition in here:
        conditions.remove(condition)
    coefficients: dict[str, Tensor] = {}
    arrived = None
    if seed is not None and root.requires_grad:
        listed = tensors if leaf is None else {_INPUT: leaf, **tensors}
        coefficients = backward_through(root, seed, listed, conditions=here)
        arrived = coefficients.pop(_INPUT, None)
    kept = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    return Part(kept, {name: references[name] for name in tensors if name in references}, coefficients, bool(here)), arrived


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A block's input among its arguments."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, Tensor):
        raise RelevanceError("a block is not called with its hidden states first, so that it cannot be run again; leave out recompute=True")
    return found


def _with_hidden(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments with this tensor as its input."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def _own_cache(argument: Any) -> Any:
    return copy.deepcopy(argument) if isinstance(argument, Cache) else argument


def _drop_pattern(block: nn.Module) -> None:
    """Some components of TransformerLens keep their last pattern (and with it the graph), which nothing reads."""
    for module in block.modules():
        if isinstance(getattr(module, "_pattern", None), Tensor):
            module._pattern = None  # type: ignore[assignment]


def _first(output: Any) -> Tensor:
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)
