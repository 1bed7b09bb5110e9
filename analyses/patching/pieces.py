"""The pairs in pieces that fit a forward pass, and the bar that says how far it has got."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from rich.progress import Progress
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.batches import rows_together
from analyses.datasets.progress import progress_bar
from analyses.patching.plan import TOKENS_PER_PASS
from analyses.tasks import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.metrics import AtPositions, Metric
from lens_relevance.inputs.targets import as_target
from lens_relevance.logit_reading import can_read_some


@dataclass(frozen=True)
class Piece:
    """Rows of the pairs that are run together. The mask is None where every token is real.

    columns: the positions at which logits are computed; None: all. metric: of the logits there.
    """

    clean: Int[Tensor, "n pos"]
    corrupt: Int[Tensor, "n pos"]
    mask: Int[Tensor, "n pos"] | None
    metric: Metric
    columns: Int[Tensor, " column"] | None

    def first_difference(self) -> int:
        """The first position at which clean and corrupt differ in any row; the last one if they never do."""
        differ = (self.clean != self.corrupt).any(dim=0).nonzero()
        return int(differ[0]) if len(differ) else self.clean.shape[1] - 1


def pieces_of(model: TransformerBridge, pairs: PromptPairs, metric: Any, *, batch_size: int | None) -> Iterator[Piece]:
    """The pairs in pieces of at most `batch_size` rows (None: TOKENS_PER_PASS tokens).

    A function that needs all rows together gets them in one piece.
    """
    n, n_pos = pairs.clean.shape
    target = as_target(pairs.target if metric is None else metric).made_for(n)
    if target.point is not None:
        raise RelevanceError(f"the target is a latent at {target.point}; patching reads the logits: give a target of logits as `metric`")
    masks = [torch.ones_like(pairs.clean) if mask is None else mask for mask in (pairs.clean_mask, pairs.corrupt_mask)]
    size = rows_together(model, target, pairs.clean, mask=masks[0], size=batch_size or max(1, TOKENS_PER_PASS // n_pos))
    for start in range(0, n, size):
        rows = slice(start, start + size)
        clean, corrupt, mask, same = (ids[rows].to(model.cfg.device) for ids in (pairs.clean, pairs.corrupt, *masks))
        here = target.select(rows)
        (clean, mask), (corrupt, _) = here.extend(model, clean, mask), here.extend(model, corrupt, same)
        yield Piece(clean, corrupt, None if mask.all() else mask, *_at_columns(model, here.metric(model, clean, mask)))


def _at_columns(model: TransformerBridge, metric: Metric) -> tuple[Metric, Int[Tensor, " column"] | None]:
    """The metric as a function of the logits at the positions that it reads of some row, and these positions."""
    if metric.at is None or not can_read_some(model):
        return metric, None
    columns, index = metric.at.unique(return_inverse=True)
    in_order = index.shape[1] == len(columns) and bool((index == torch.arange(len(columns), device=index.device)).all())
    return metric.of_read() if in_order else AtPositions(index, metric.of_read()), columns


def bar_if(progress: bool) -> Progress:
    """A progress bar, which shows nothing unless it is asked for and standard error is a terminal."""
    bar = progress_bar()
    bar.disable = bar.disable or not progress
    return bar
