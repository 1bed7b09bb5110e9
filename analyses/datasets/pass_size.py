"""How many pairs go into one pass of a data-set run: as many as fit into memory, and on a processor no more than keep it busy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Run
from analyses.datasets.checkpoint import saved_setting
from analyses.datasets.processes import processes
from analyses.methods import Estimator
from analyses.tasks import PromptPairs
from lens_relevance import Estimate, RelevanceError, logit_diff
from lens_relevance.inputs.targets import as_target
from lens_relevance.memory.estimate_of_run import Work, device_of, surely_fits
from lens_relevance.sites import anatomy

TOKENS_ON_A_PROCESSOR = 2048  # more in one pass is no faster there
_SHARE = 0.5  # of what is free


def pairs_per_pass(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Sequence[Estimator],
    components: Sequence[str],
    *,
    run: Run = "corrupt",
    checkpoint: str | Path | None = None,
) -> int:
    """Pairs in one pass of these methods.

    What a pass takes is estimated from a trial (see `lens_relevance.estimate`), where it is not small beside what is free. A run that goes
    on from a checkpoint keeps the number that it began with, and processes agree on the smallest.
    """
    if checkpoint is not None and (saved := saved_setting(checkpoint, "batch_size")) is not None:
        return int(saved)
    if not len(pairs):
        return 1
    return min(processes().gather(min((_fitting(model, pairs, method, components, run=run) for method in methods), default=1)))


def _fitting(model: TransformerBridge, pairs: PromptPairs, method: Estimator, components: Sequence[str], *, run: Run) -> int:
    tokens, body = pairs.clean.shape[1], anatomy(model)
    size = max(1, TOKENS_ON_A_PROCESSOR // tokens) if device_of(model).type == "cpu" else max(1, len(pairs))
    scored = [name for name in components if name in method.components]
    one = pairs[:1]
    metric = as_target(one.target).metric(model, one.corrupt, one.corrupt_mask)

    def on_trial(ids: Tensor) -> Any:
        target: Any = _first_logits if metric.at is None else logit_diff(0, 1)
        return method(model, PromptPairs(ids, ids, target), scored, run=run)

    def work(size: int) -> Work:
        return Work(model, body, on_trial, (method.name, tuple(scored), run, metric.at is None), size, tokens, forwards=method.forwards)

    if surely_fits(work(size)):
        return size
    try:
        return _largest(work, size)
    except RelevanceError:  # of the trial; the run itself will say what is wrong, if anything is
        return max(1, min(size, TOKENS_ON_A_PROCESSOR // tokens))


def _largest(work: Any, size: int) -> int:
    """The largest of `size`, its half, ... that fits at once, or, where not even one pair does, block by block."""
    for recompute in (False, True):
        tried = size
        while tried:
            estimate = Estimate(work(tried))
            peak = estimate.recompute_bytes if recompute else estimate.plain_bytes
            if peak is not None and peak <= _SHARE * estimate.free_bytes:
                return tried
            tried //= 2
    return 1


def _first_logits(logits: Tensor) -> Tensor:
    return logits[..., 0].flatten(1).sum(1)
