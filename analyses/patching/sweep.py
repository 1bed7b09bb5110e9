"""Many patched runs in one pass up the model.

A patched run equals the run without patches below the patched layer, and, with causal attention, before the patched position. So a batch
of patched runs starts at its lowest layer and position, each row joins at the block that it patches, and keys and values of earlier
positions come from the run without patches.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching.recording import Recording, forward

Edit = Callable[[Tensor, int], Tensor | None]
"""What happens at a HookPoint: (activation of the rows that have joined, first position) -> new activation, or None to leave it."""

Edits = dict[int, list[tuple[str, Edit]]]
"""Layer -> (HookPoint within the block, edit)."""

Shortcut = Literal["position", "layer", "none"]
"""What a patched run may skip: earlier positions and layers, earlier layers, nothing."""


@dataclass(frozen=True)
class Rows:
    """The batch of a pass. `base` [rows]: row of the recording that each starts from; `layer`: the block where each joins, ascending."""

    base: Int[Tensor, " rows"]
    layer: tuple[int, ...]
    start: int

    def joined(self, layer: int) -> int:
        """How many rows take part in block `layer`."""
        return bisect_right(self.layer, layer)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.base[rows], self.layer[rows], self.start)


def run_rows(
    model: TransformerBridge, recording: Recording, rows: Rows, edits: Edits, columns: Int[Tensor, " column"], shortcut: Shortcut
) -> Float[Tensor, "rows late_column d_model_or_d_vocab"]:
    """One pass with edits. Returns what `to_logits` turns into the logits of each row at `columns`.

    That is the stream after the last block at those columns that the pass reached, or the logits themselves if nothing was skipped.
    """
    start = rows.start if shortcut == "position" else 0

    def hooked(layer: int, name: str, edit: Edit) -> tuple[str, Any]:
        return f"blocks.{layer}.{name}", lambda value, hook: edit(value, start)

    with model.hooks(fwd_hooks=[hooked(layer, name, edit) for layer, here in edits.items() for name, edit in here]):
        if shortcut == "none":
            mask = None if recording.mask is None else recording.mask[rows.base]
            return forward(model, recording.tokens[rows.base], mask)[:, columns]
        return _go_on(model, recording, rows, start)[:, columns[columns >= start] - start]


def _go_on(model: TransformerBridge, recording: Recording, rows: Rows, start: int) -> Float[Tensor, "rows pos d_model"]:
    """The residual stream after the last block."""
    first = rows.layer[0]
    residual = recording.resid_pre(first)[:0, start:]
    for layer in range(first, len(model.blocks)):
        joined = rows.joined(layer)
        joining = rows.base[len(residual) : joined]
        residual = torch.cat([residual, recording.resid_pre(layer)[joining, start:]])
        args, kwargs = recording.call(layer, rows.base[:joined], start)
        output = model.blocks[layer](residual, *args, **kwargs)
        residual = output[0] if isinstance(output, tuple) else output
    return residual


def to_logits(
    model: TransformerBridge, recording: Recording, rows: Rows, outcome: Tensor, columns: Int[Tensor, " column"], shortcut: Shortcut
) -> Float[Tensor, "rows column d_vocab"]:
    """Logits at `columns` of the outcome of `run_rows`; before the first patched position they are those of the run without patches."""
    if shortcut == "none":
        return outcome
    logits = _as_final(model, model.unembed(model.ln_final(outcome)))
    if logits.shape[1] == len(columns):
        return logits
    whole = recording.logits[rows.base][:, columns]
    whole[:, columns >= rows.start] = logits
    return whole


def _as_final(model: TransformerBridge, logits: Tensor) -> Tensor:
    """What some models do to the logits outside of any module: scale (Granite, Cohere) or soft-cap (Gemma2, native) them."""
    config = getattr(model.original_model, "config", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None) or getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits
