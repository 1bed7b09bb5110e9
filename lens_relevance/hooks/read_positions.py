"""Logits at the positions that are read, and nowhere else: a large vocabulary costs more than all blocks of a small model.

What enters the unembedding is taken at these positions, by a hook: the model's own unembedding, soft-cap and scaling then run on them
alone, and all HookPoints below have all positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lens_relevance.hooked_model import HookedModel, is_bridge
from lens_relevance.hooks.interrupts import protected_contextmanager

UNEMBEDDING = ("unembed.hook_in", "unembed.hook_out")


class ReadPositions:
    """Positions [batch, n] of tokens [batch, pos] at which logits are computed. `taken`: whether the last forward did so."""

    def __init__(self, at: Int[Tensor, "batch n"], n_pos: int) -> None:
        self.at, self.n_pos, self.taken = at, n_pos, False

    def take(self, x: Tensor, hook: Any) -> Tensor:
        """The rows' positions of what enters the unembedding, where it has positions (that of an image classifier has none)."""
        self.taken = x.ndim == 3 and x.shape[:2] == (len(self.at), self.n_pos)
        if not self.taken:
            return x
        return x[torch.arange(len(x), device=x.device).unsqueeze(1), self.at.to(x.device)]


def can_take(model: HookedModel) -> bool:
    """Whether logits can be had at some positions alone: not where a hook of the user's would see fewer positions than it expects."""
    points = model.hook_dict if is_bridge(model) else {}
    if not is_bridge(model) or not all(name in points for name in UNEMBEDDING):
        return False
    entry, output = (points[name] for name in UNEMBEDDING)
    modules = (model.unembed, model.unembed.original_component)
    hooked = any(m is not None and (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks) for m in modules)
    return not (hooked or entry.has_hooks(dir="bwd") or output.has_hooks())


@protected_contextmanager
def reading_at(model: HookedModel, positions: ReadPositions | None) -> Iterator[None]:
    """Logits at these positions alone, in every forward inside; None: everywhere."""
    if positions is None or not is_bridge(model):
        yield
        return
    with model.hooks(fwd_hooks=[(UNEMBEDDING[0], positions.take)]):
        yield
