"""The metric of many patched runs of one recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching.checks import find_shortcut
from analyses.patching.plan import Patch, Values, edits_of, passes, rows_of
from analyses.patching.readout import Readout, evaluate
from analyses.patching.recording import Recording
from analyses.patching.sweep import Rows, Shortcut, run_rows, to_logits

LOGITS_AT_ONCE = 2**26
"""Elements of the logits computed at a time: 256 MB in fp32."""


@dataclass
class Patcher:
    """A recorded run, ready to be patched.

    Attributes:
        first: first position [pos] at which the values to be set differ from the recorded ones; earlier patches change nothing.
        batch_size: rows per pass, None for a size that suits most machines.
        done: called with the number of patches that have been run, pass by pass.
        shortcut: what patched runs may skip; found out on the first patches.
    """

    model: TransformerBridge
    recording: Recording
    readout: Readout
    first: int = 0
    batch_size: int | None = None
    done: Callable[[int], object] = lambda count: None
    shortcut: Shortcut | None = None

    def metric(self, patches: Sequence[Patch], values: Values) -> Float[Tensor, "patch n_or_1"]:
        """The metric with each patch on its own."""
        n = self.recording.n
        baseline = evaluate(self.readout.metric, self.recording.logits)
        result = baseline.repeat(len(patches), 1)
        shortcut = self.settle(patches, values)
        # a patch before the first difference sets what is there already, but nothing proves that if "position" does not hold
        effective = [patch for patch in patches if patch.start >= self.first or shortcut != "position"]
        self.done(len(patches) - len(effective))
        where = {id(patch): number for number, patch in enumerate(patches)}
        base = torch.arange(n, device=self.recording.tokens.device)
        for group in passes(effective, self.recording, self.batch_size, shortcut=shortcut):
            rows, edits = rows_of(group, base), edits_of(group, values, n)
            outcome = run_rows(self.model, self.recording, rows, edits=edits, columns=self.readout.columns, shortcut=shortcut)
            result[[where[id(patch)] for patch in group]] = self.read(rows, outcome)
            self.done(len(group))
        return result

    def settle(self, patches: Sequence[Patch], values: Values) -> Shortcut:
        """The shortcut for these and all later patches of this recording."""
        if self.shortcut is None:
            effective = [patch for patch in patches if patch.start >= self.first]
            self.shortcut = find_shortcut(self.model, self.recording, effective, values=values, readout=self.readout)
        return self.shortcut

    def read(self, rows: Rows, outcome: Tensor) -> Float[Tensor, "patch n_or_1"]:
        """The metric of the outcome of a pass, patch by patch."""
        n, columns, read = self.recording.n, self.readout.columns, []
        n_tokens = self.recording.logits.shape[-1] if self.readout.tokens is None else len(self.readout.tokens)
        per_patch = n * len(columns) * n_tokens
        step = n * max(1, LOGITS_AT_ONCE // per_patch)
        assert self.shortcut is not None
        for start in range(0, len(rows.base), step):
            piece = slice(start, start + step)
            logits = to_logits(
                self.model, self.recording, rows[piece], outcome=outcome[piece], readout=self.readout, shortcut=self.shortcut
            )
            read += [self.readout(logits[row : row + n]) for row in range(0, len(logits), n)]
        values = torch.stack(read)
        if self.readout.tokens is not None and bool(values.isnan().any()):
            self.readout.tokens = None  # which tokens the metric looks at depends on the logits
            return self.read(rows, outcome)
        return values
