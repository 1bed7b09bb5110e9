"""Reading tensors at HookPoints: which are asked for, which pass, and how they are kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.session import Session
from lens_relevance.hooks.storage import Storage
from lens_relevance.rules.base import difference, share
from lens_relevance.sites import Anatomy

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None


def wanted(body: Anatomy, names_filter: NamesFilter) -> tuple[list[str], set[str]]:
    """Canonical names to keep, and those among them that were asked for by name."""
    if names_filter is None:
        names = [name for roles in body.stacks.roles.values() for listed in roles.values() for name in listed]
        return [n for n in dict.fromkeys(names) if n in body.points], set()
    if callable(names_filter):
        return [n for n in body.points if names_filter(n)], set()
    listed = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    names = list(dict.fromkeys(body.canonical(n) for n in listed))
    for name in names:
        if name in body.decorative:
            raise RelevanceError(
                f"{name} is decorative on this model: it fires on another tensor than its name says, or its edits are thrown away"
            )
    return names, set(names)


def hooked_points(body: Anatomy) -> list[str]:
    """Names of HookPoints with forward hooks, of the user or of TransformerLens itself."""
    return [name for name, point in body.points.items() if point.fwd_hooks and name not in body.decorative]


def before_hooks(name: str) -> str:
    """What a tensor is called that a HookPoint's hooks are given, where what they return is called by the HookPoint."""
    return f"{name} (before its hooks)"


class Taps:
    """Collects the tensors that pass chosen HookPoints, as they leave the point's hooks."""

    def __init__(self, opened: Session, body: Anatomy, names: list[str]) -> None:
        self._tensors: dict[str, Tensor] = {}
        self._opened, self._body = opened, body
        self.fired: dict[str, bool] = {}  # whether what passed is on the graph; supposed of what `only` leaves without one
        self.only: Collection[str] | None = None  # names that are kept while a part runs without a graph; None: it has one, and all are
        self.names: list[str] = []
        self.add(names)

    def add(self, names: list[str]) -> None:
        """Tap more HookPoints."""
        for name in dict.fromkeys(names):
            if name not in self.names:
                self.names.append(name)
                if name in self._body.decorative:
                    continue  # not even touched: T5's norms go on with what they find there, if anybody does
                self._opened.state(self._body.points[name]).taps.append(partial(self.store, name))

    def add_both_sides(self, names: list[str]) -> None:
        """Tap HookPoints before their hooks (`before_hooks(name)`) and after."""
        self.add(names)
        for name in names:
            self._opened.state(self._body.points[name]).taps_before_hooks.append(partial(self.store, before_hooks(name)))

    def store(self, name: str, x: Tensor) -> Tensor | None:
        """Keep what passes. A HookPoint hands on the tensor it was given, so that two of them may hold the same one: only a view of its
        own has the coefficient of this point's branch."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return None
        if self.only is not None:
            self.fired[name] = True
            if name in self.only:
                self._tensors[name] = x
            return None
        own = x.view_as(x) if x.requires_grad else x
        self._tensors[name] = own
        self.fired[name] = x.requires_grad
        return own

    def take(self) -> dict[str, Tensor]:
        """The tensors of the forward just run, in the order in which they fired."""
        taken, self._tensors = self._tensors, {}
        return taken

    def fired_until(self, name: str | None) -> list[str]:
        """The tapped HookPoints that fired, in their order, up to this one."""
        fired = list(self.fired)
        return fired if name is None else fired[: fired.index(name) + 1]

    def convert(self, name: str, tensor: Tensor) -> Tensor:
        """A raw tensor in TransformerLens's layout."""
        conversion = self._body.conversion(name) if name in self._body.points else None  # a feature's values have one layout
        return tensor if conversion is None else conversion.convert(tensor)

    def absent(self, explicit: Collection[str]) -> dict[str, str]:
        """Why tapped HookPoints have no coefficient to give; an error for those asked for by name."""
        absent = {}
        for name in self.names:
            if name in self._body.decorative:
                absent[name] = "decorative on this model: it fires on another tensor than its name says"
            elif name not in self.fired:
                absent[name] = "did not fire in this forward, or holds integers"
                remedy = "some HookPoints fire only behind a flag such as model.set_use_attn_result(True)"
            elif not self.fired[name]:
                absent[name] = "is a side branch on this model: the model does not go on with it"
                remedy = "ask for the component's hook_in or hook_out instead"
            if name in absent and name in explicit:
                raise RelevanceError(f"{name} {absent[name]}; {remedy}")
        return absent

    def check_reached(self, coefficients: Collection[str], absent: dict[str, str], explicit: Collection[str]) -> None:
        """Note the HookPoints that no coefficient reached; an error for those asked for by name."""
        for name in self.names:
            if name not in coefficients and name not in absent:
                absent[name] = "nothing flows from the target to this HookPoint, or the model does not go on with what it returns"
                if name in explicit:
                    raise RelevanceError(f"{name}: {absent[name]}")


@dataclass
class Part:
    """What the backward found in one part of the model: raw tensors by canonical name (references: without a reference run, none).

    starts_flow: everything above this part is off the flow from the target to what is kept (`through`).
    """

    tensors: dict[str, Tensor]
    references: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    starts_flow: bool = False

    def add(self, other: Part) -> None:
        """Take in another part."""
        self.tensors |= other.tensors
        self.references |= other.references
        self.coefficients |= other.coefficients


class Kept:
    """What a RelevanceCache keeps: tensors in TransformerLens's layout, zero at padding, averaged over n references, moved where the user
    wants them."""

    def __init__(self, body: Anatomy, names: list[str], masks: Mapping[str, Tensor], *, n: int, storage: Storage) -> None:
        self._body, self._names, self._masks, self._n, self._storage = body, names, masks, n, storage
        self._padded = {stack: not bool((mask == 1).all()) for stack, mask in masks.items()}
        self._groups: dict[str, dict[str, Tensor]] = {"activations": {}, "coefficients": {}, "reference_activations": {}, "averaged": {}}
        self._finite: dict[str, Tensor] = {}
        self.reached: set[str] = set()

    @torch.no_grad()
    def add(self, part: Part) -> None:
        """Take in what the backward found in one part of the model."""
        if part.starts_flow:
            self.reached.clear()
            self._finite.clear()
            for group in self._groups.values():
                group.clear()
        self.reached |= set(part.coefficients)
        for name in self._names:
            if name in part.coefficients:
                self._keep(name, part.tensors[name].detach(), part.coefficients[name].detach(), part.references.get(name))

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Everything by group, each in the order in which it was asked for."""
        return {group: {name: kept[name] for name in self._names if name in kept} for group, kept in self._groups.items()}

    def finite(self) -> dict[str, Tensor]:
        """Whether all coefficients are, by HookPoint, in the order in which they were asked for."""
        return {name: self._finite[name] for name in self._names if name in self._finite}

    def _keep(self, name: str, activation: Tensor, coefficient: Tensor, reference: Tensor | None) -> None:
        point, stack = self._body.points[name], self._body.stack_of(name)
        conversion = self._body.conversion(name)
        convert = conversion.convert if conversion is not None else (lambda x: x)
        kept = {"activations": activation, "coefficients": coefficient}
        if reference is not None:
            kept["reference_activations"] = reference
        kept = {group: convert(batched(tensor, self._masks.get(stack), self._n)) for group, tensor in kept.items()}
        if self._padded.get(stack) and kept["coefficients"].ndim > 2:  # what a classifier pools has no positions
            mask = self._masks[stack].repeat_interleave(self._n, 0)
            kept["coefficients"] = zero_at_padding(name, kept["coefficients"], mask, point.pos_dim)
        if self._n > 1:
            each = share(difference(kept["activations"], kept["reference_activations"]), kept["coefficients"])
            kept = {key: average(tensor, self._n) for key, tensor in kept.items()} | {"averaged": average(each, self._n)}
        self._finite[name] = kept["coefficients"].abs().amax().isfinite()  # NaN and inf stay; ten times faster than entry by entry
        for group, tensor in kept.items():
            self._groups[group][name] = self._storage.keep(tensor)


def batched(tensor: Tensor, mask: Tensor | None, n: int) -> Tensor:
    """[rows * pos, d] as [rows, pos, d], of n rows per example: OPT folds positions into the batch around its MLP."""
    if mask is None or tensor.ndim != 2 or tensor.shape[0] != n * mask.numel():
        return tensor
    return tensor.unflatten(0, (-1, mask.shape[1]))


def average(rows: Tensor, n: int) -> Tensor:
    """Mean over the n references of each example."""
    return rows if n == 1 else rows.unflatten(0, (-1, n)).mean(1)


def zero_at_padding(name: str, coefficient: Tensor, mask: Tensor, pos_dim: int | None) -> Tensor:
    """Exactly 0 at padding, whatever NaN a fully masked row may hold there. Patterns and scores have their queries at dim -2."""
    attention = name.endswith(("hook_pattern", "hook_attn_scores"))
    dim = pos_dim if pos_dim is not None else (-2 if attention else 1)
    shape = [1] * coefficient.ndim
    shape[0], shape[dim] = mask.shape
    return torch.where(mask.bool().reshape(shape).to(coefficient.device), coefficient, torch.zeros_like(coefficient))
