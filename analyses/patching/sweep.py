"""Many patched runs in one pass up the model.

A patched run equals the run without patches below the patched layer, and, with causal attention, before the patched position. So a batch
of patched runs starts at its lowest layer and position, each row joins at the block that it patches, and keys and values of earlier
positions come from the run without patches. Of the last block, positions before the first whose logits are read give keys and values only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from analyses.patching.readout import Readout
from analyses.patching.recording import Recording, forward, take_rows

Edit = Callable[[Tensor, int], Tensor | None]
"""What happens at a HookPoint: (activation of the rows that have joined, first position) -> new activation, or None to leave it.

The activation is of some consecutive positions, not always up to the last one.
"""

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
    model: TransformerBridge, recording: Recording, rows: Rows, *, edits: Edits, columns: Int[Tensor, " column"], shortcut: Shortcut
) -> Float[Tensor, "rows late_column d_model_or_d_vocab"]:
    """One pass with edits. Returns what `to_logits` turns into the logits of each row at `columns`.

    That is the stream after the last block at those columns that the pass reached, or the logits themselves if nothing was skipped.
    """
    run = _Run(model, recording, rows.start if shortcut == "position" else 0)

    def hooked(layer: int, name: str, edit: Edit) -> tuple[str, Any]:
        return f"blocks.{layer}.{name}", lambda value, hook: edit(value, run.start)

    with model.hooks(fwd_hooks=[hooked(layer, name, edit) for layer, here in edits.items() for name, edit in here]):
        if shortcut == "none":
            mask = None if recording.mask is None else recording.mask[rows.base]
            if recording.columns is not None:
                return forward(model, recording.tokens[rows.base], mask, columns)
            return forward(model, recording.tokens[rows.base], mask)[:, columns]
        residual = run.up_to_last_block(rows)
        first_read = int(columns[0]) if shortcut == "position" else 0
        residual = run.last_block(residual, rows, first_read)
        return residual[:, (columns[columns >= run.start] - run.start).to(residual.device)]


class _Run:
    """The blocks called one by one, from position `start` on; below it, keys and values are those of the recording."""

    def __init__(self, model: TransformerBridge, recording: Recording, start: int) -> None:
        self.blocks, self.recording, self.start = model.blocks, recording, start

    def up_to_last_block(self, rows: Rows) -> Float[Tensor, "rows pos d_model"]:
        """The residual stream with which the last block is to be called."""
        first, last = rows.layer[0], len(self.blocks) - 1
        residual = self.recording.resid_pre(first)[:0, self.start :]
        for layer in range(first, last + 1):
            joining = rows.base[len(residual) : rows.joined(layer)]
            entering = take_rows(self.recording.resid_pre(layer)[:, self.start :], joining)
            residual = torch.cat([residual.to(entering.device), entering])
            if layer < last:
                residual = self._block(layer, residual, rows, None)
        return residual

    def last_block(
        self, residual: Float[Tensor, "rows pos d_model"], rows: Rows, first_read: int
    ) -> Float[Tensor, "rows late_pos d_model"]:
        """The residual stream after the last block, from `first_read` on, which becomes `start` if it lies later."""
        last, skipped = len(self.blocks) - 1, first_read - self.start
        if skipped <= 0:
            return self._block(last, residual, rows, None)
        cache = _KeysAndValuesOnly()
        self.recording.prefix(last, rows.base, self.start, into=cache)
        with suppress(_Stop):
            self._block(last, residual[:, :skipped], rows, cache)
            raise RuntimeError("the block did not add to the cache that it was given")
        cache.full, self.start = True, first_read
        return self._block(last, residual[:, skipped:], rows, cache)

    def _block(self, layer: int, residual: Tensor, rows: Rows, cache: DynamicCache | None) -> Float[Tensor, "rows pos d_model"]:
        base = rows.base[: rows.joined(layer)]
        if cache is None and self.start > 0:
            cache = self.recording.prefix(layer, base, self.start, into=DynamicCache())
        args, kwargs = self.recording.call(layer, base, slice(self.start, self.start + residual.shape[1]), cache=cache)
        output = self.blocks[layer](residual, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


class _Stop(Exception):
    """Nothing more is wanted of this block."""


class _KeysAndValuesOnly(DynamicCache):
    """A cache that ends the block as soon as it has keys and values, until it is `full`."""

    full = False

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values as DynamicCache keeps them; ends the block here until the cache is `full`."""
        both = super().update(*args, **kwargs)
        if not self.full:
            raise _Stop
        return both


def to_logits(
    model: TransformerBridge, recording: Recording, rows: Rows, *, outcome: Tensor, readout: Readout, shortcut: Shortcut
) -> Float[Tensor, "rows column token"]:
    """The logits that are read, of the outcome of `run_rows`; before the first patched position those of the run without patches."""
    columns, tokens = readout.columns, slice(None) if readout.tokens is None else readout.tokens
    if shortcut == "none":
        return outcome[:, :, tokens]
    logits = _as_final(model, _unembed(model, model.ln_final(outcome), readout.tokens)).to(recording.logits.device)
    if logits.shape[1] == len(columns):
        return logits
    computed = columns if recording.columns is None else torch.searchsorted(recording.columns, columns)
    whole = take_rows(recording.logits, rows.base)[:, computed][:, :, tokens]
    whole[:, columns >= rows.start] = logits
    return whole


def _unembed(model: TransformerBridge, final: Float[Tensor, "rows column d_model"], tokens: Int[Tensor, " token"] | None) -> Tensor:
    """Logits of `tokens`, or of the whole vocabulary, which alone can take as long as two blocks."""
    if tokens is None:
        return model.unembed(final)
    module = model.unembed.original_component
    weight, bias = module.weight, getattr(module, "bias", None)
    here = tokens.to(weight.device)
    return F.linear(final.to(weight.device), weight[here], None if bias is None else bias[here])


def _as_final(model: TransformerBridge, logits: Tensor) -> Tensor:
    """What some models do to the logits outside of any module: scale (Granite, Cohere) or soft-cap (Gemma2, native) them."""
    config = getattr(model.original_model, "config", None)
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None) or getattr(model.cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits
