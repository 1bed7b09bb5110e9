"""From patches to passes: which patches share a pass, and what each does to the activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Int
from torch import Tensor

from analyses.components import COMPONENTS, Node
from analyses.patching.recording import Recording
from analyses.patching.sweep import Edit, Edits, Rows, Shortcut
from lens_relevance.errors import RelevanceError

Values = dict[tuple[str, int], Tensor]
"""(component, layer) -> activation [rows, ...] that patches take their values from."""

TOKENS_PER_PASS = 2048
"""Unless told otherwise a pass has this many tokens: enough to keep the matrix products busy, few enough for the caches."""
TOKENS_WORTH_A_PASS = 512
"""Patches at different positions share a pass, which then starts at the first of them, until it has this many tokens."""


@dataclass(frozen=True)
class Patch:
    """A node to set in n rows, the position from which this changes anything, and the first of the n rows of its values."""

    node: Node
    start: int
    offset: int = 0


def rows_of(patches: Sequence[Patch], base: Int[Tensor, " n"]) -> Rows:
    """The batch for `patches`, in layer order: rows `base` of the recording for the first, then for the second, ..."""
    layers = tuple(patch.node.layer for patch in patches for _ in range(len(base)))
    return Rows(base.repeat(len(patches)), layers, min(patch.start for patch in patches))


def edits_of(patches: Sequence[Patch], values: Values, n: int) -> Edits:
    """What each layer has to change for `patches`, in layer order."""
    edits: Edits = {}
    numbered = sorted(enumerate(patches), key=lambda item: _kind(item[1].node))
    for (component, layer, _), group in groupby(numbered, key=lambda item: _kind(item[1].node)):
        members = list(group)
        edit = _edit([number for number, _ in members], [patch for _, patch in members], values[component, layer], n)
        edits.setdefault(layer, []).append((COMPONENTS[component].write, edit))
    return edits


def _kind(node: Node) -> tuple[str, int, bool]:
    """Patches alike in this are written by one indexed assignment."""
    return node.component, node.layer, node.position is None


def _edit(numbers: list[int], patches: list[Patch], values: Tensor, n: int) -> Edit:
    """The edit that sets the nodes of `patches`, each in its own n rows of the batch."""
    device = values.device

    def column(numbers: list[int]) -> Tensor:  # [patch, 1], to be indexed together with [patch, row]
        return torch.tensor(numbers, device=device)[:, None]

    row = torch.arange(n, device=device)
    nodes = [patch.node for patch in patches]
    to_rows, from_rows = column([number * n for number in numbers]) + row, column([patch.offset for patch in patches]) + row
    axes = COMPONENTS[nodes[0].component].axes
    chosen: dict[str, Tensor] = {}
    for axis, indices in (("head", [node.head for node in nodes]), ("neuron", [node.neuron for node in nodes])):
        if axis in axes:
            chosen[axis] = column([index for index in indices if index is not None])
    positions = [node.position for node in nodes if node.position is not None]

    def edit(value: Tensor, start: int) -> Tensor | None:
        if value.ndim != len(axes):
            raise RelevanceError(f"{nodes[0]}: expected an activation [{', '.join(axes)}], the HookPoint shows {tuple(value.shape)}")
        stop = start + value.shape[axes.index("pos")]
        here = [i for i, position in enumerate(positions) if start <= position < stop] if positions else list(range(len(nodes)))
        if not here:
            return None
        target: list[Tensor | slice] = []
        source: list[Tensor | slice] = []
        for axis in axes:
            if axis == "batch":
                target.append(to_rows[here])
                source.append(from_rows[here])
            elif axis == "pos" and positions:
                at = column([positions[i] for i in here])
                target.append(at - start)
                source.append(at)
            elif axis == "pos":
                target.append(slice(None))
                source.append(slice(start, stop))
            else:
                index = chosen[axis][here] if axis in chosen else slice(None)
                target.append(index)
                source.append(index)
        value = value.clone()
        value[tuple(target)] = values[tuple(source)].to(value.dtype)
        return value

    return edit


def passes(patches: Sequence[Patch], recording: Recording, batch_size: int | None, *, shortcut: Shortcut) -> Iterator[list[Patch]]:
    """`patches` in groups for one pass each, in layer order within a group.

    Args:
        batch_size: rows per pass (at least those of one patch); None for as many as make TOKENS_PER_PASS.
    """
    n, group, start = recording.n, list[Patch](), 0
    for patch in sorted(patches, key=lambda patch: (patch.start if shortcut == "position" else 0, patch.node.layer)):
        if group:
            tokens = len(group) * n * (recording.n_pos - start)
            full = tokens + n * (recording.n_pos - start) > TOKENS_PER_PASS if batch_size is None else (len(group) + 1) * n > batch_size
            if full or (shortcut == "position" and patch.start != start and tokens >= TOKENS_WORTH_A_PASS):
                yield sorted(group, key=lambda patch: patch.node.layer)
                group = []
        if not group:
            start = patch.start if shortcut == "position" else 0
        group.append(patch)
    if group:
        yield sorted(group, key=lambda patch: patch.node.layer)
