"""Site: where one operation of a model has its input and output HookPoints. DeclaredSite: the same with HookPoints by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from torch import nn
from transformer_lens.hook_points import HookPoint

from lens_relevance.rules.base import Operation, Rule

LOGITS = "logits"
_BLOCK = re.compile(r"(?:^|\.)(blocks|encoder_blocks|decoder_blocks)\.(\d+)\.")


@cache  # asked for every name of a model in each call
def block_of(name: str) -> tuple[str, int | None]:
    """The stack of blocks that holds a component or HookPoint, and the block's index; ("", None) for what is in no block."""
    found = _BLOCK.search(name + ".")
    return (found.group(1), int(found.group(2))) if found else ("", None)


class InnerPoints:
    """HookPoints inside an operation, at which hooks may edit one of its steps.

    Attributes:
        points: The HookPoints, in the order in which they fire.
        passes_by: Whether the model goes past them unless a hook edits what it finds there; then it goes on with what they return.
        edited: Those at which a hook did, in the forward under way or the last one.
    """

    def __init__(self, *points: HookPoint, passes_by: Callable[[], bool]) -> None:
        self.points, self.passes_by = points, passes_by
        self.edited: set[HookPoint] = set()

    @property
    def is_edited(self) -> bool:
        return bool(self.edited)

    @property
    def have_hooks(self) -> bool:
        return any(point.fwd_hooks for point in self.points)

    def note(self, point: HookPoint, is_edited: bool) -> None:
        """A HookPoint has fired."""
        if point is self.points[0]:
            self.edited.clear()
        if is_edited:
            self.edited.add(point)


@dataclass(eq=False)
class Site:
    """One operation and the HookPoints around it.

    Attributes:
        name: path of the component, with the operation after a colon where a component has several ("blocks.0.attn:scores").
        mount: the component's place in its parent ("ln1", "q_norm", "ln_final", "mlp"), by which rules can be chosen.
        operation: what is computed.
        inputs: HookPoints whose raw (unconverted) tensors the operation takes.
        output: the HookPoint whose raw tensor it gives; None for the logits that the model returns.
        caller: a module whose call arguments the operation needs (masks, positions).
        on_call: receives these arguments, by position and by name, before each forward of `caller`.
        enabled: whether the site describes its operation at the moment, under a rule (a norm has two forms, see rules/normalization.py).
        considered: whether it may turn out to, in the forward under way, where that depends on what hooks do.
        inner: HookPoints inside the operation, or of one of its steps, at which hooks may edit it.
        component: the module whose output has to depend on the site, where there is one: it shows whether the model uses the HookPoints.
        rebuilt: where a model computes the operation without using its HookPoints, the one at which it is recomputed: the first from the
            site's output on whose tensor the model uses (see hooks/recomputation.py).
        n_layers: how many blocks the stack has that the site is in; None outside of blocks.
    """

    name: str
    mount: str
    operation: Operation
    inputs: tuple[HookPoint, ...]
    output: HookPoint | None
    caller: nn.Module | None = None
    on_call: Callable[[tuple[object, ...], dict[str, object]], None] | None = None
    enabled: Callable[[Rule], bool] = field(default=lambda rule: True)
    considered: Callable[[Rule], bool] = field(default=lambda rule: False)
    inner: InnerPoints | None = None
    component: nn.Module | None = None
    rebuilt: HookPoint | None = None
    n_layers: int | None = None

    @property
    def kind(self) -> str:
        return self.operation.kind

    @property
    def layer(self) -> int | None:
        """Index of the block that holds the site; None for embeddings, the final norm and the unembedding."""
        return block_of(self.name)[1]

    @property
    def stack(self) -> str:
        """Name of the stack of blocks that holds the site ("blocks", "encoder_blocks", "decoder_blocks"); "" outside blocks."""
        return block_of(self.name)[0]

    @property
    def points(self) -> str:
        """The HookPoints in words, for messages."""
        return f"{', '.join(str(p.name) for p in self.inputs)} -> {self.output_name}"

    @property
    def output_name(self) -> str:
        return LOGITS if self.output is None else str(self.output.name)


@dataclass(frozen=True)
class DeclaredSite:
    """An operation between HookPoints given by name; made by `norm`, `activation`, `linear`, `attention` and their like."""

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    output: str

    def at(self, points: Mapping[str, HookPoint]) -> Site:
        """The site at a model's HookPoints."""
        mount = self.name.split(":")[0].rsplit(".", 1)[-1]
        return Site(self.name, mount, self.operation, tuple(points[name] for name in self.inputs), points[self.output])
