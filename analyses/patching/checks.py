"""What is checked before anything is patched: the input, that the model uses a HookPoint's value, and what patched runs may skip."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.patching.plan import Patch, Values, edits_of, rows_of
from analyses.patching.readout import Metric, Readout, evaluate
from analyses.patching.recording import Recording, forward
from analyses.patching.sweep import Shortcut, run_rows, to_logits
from analyses.tasks.pairs import require_pairs
from lens_relevance.errors import RelevanceError
from lens_relevance.finite import check_target
from lens_relevance.inputs.prompt import Prompt

SAMPLES = 3
"""Patches on which a shortcut is compared with whole forward passes."""


def check_eval(model: TransformerBridge) -> None:
    """Refuse a model in train mode: dropout would make every run another one."""
    for root in (model, model.original_model):
        for name, module in root.named_modules():
            if module.training:
                raise RelevanceError(f"patching compares runs, but {name or 'the model'} is in train mode; call model.eval() first")


def check_pairs(pairs: Any) -> None:
    """Refuse what is no pairs, and pairs whose prompts differ in length: a position would mean two things."""
    pairs = require_pairs(pairs)
    if pairs.clean.shape != pairs.corrupt.shape or pairs.clean.ndim != 2:
        raise RelevanceError(
            f"clean and corrupt must be token ids of one shape [n, pos], got {tuple(pairs.clean.shape)} and {tuple(pairs.corrupt.shape)}; "
            "use prompts of equal length"
        )
    if pairs.clean_mask is None and pairs.corrupt_mask is None:
        return
    masks = [torch.ones_like(pairs.clean) if mask is None else mask for mask in (pairs.clean_mask, pairs.corrupt_mask)]
    differing = (masks[0].bool() != masks[1].bool()).any(dim=1).nonzero().flatten().tolist()
    if differing:
        raise RelevanceError(f"clean and corrupt are of unequal length or padded differently in pairs {differing[:5]}; drop these pairs")


def check_finite(model: TransformerBridge, metric: Metric, *recordings: Recording) -> None:
    """Refuse a metric that is NaN or inf without any patch; the error names the first HookPoint with such values."""
    for recording in recordings:
        mask = torch.ones_like(recording.tokens) if recording.mask is None else recording.mask
        check_target(evaluate(metric, recording.logits), model, Prompt(recording.tokens, mask), what="the metric")


def check_gap(clean: Float[Tensor, " pair"], corrupt: Float[Tensor, " pair"] | None) -> None:
    """Warn about pairs on which the metric is the same for clean and corrupt."""
    if corrupt is None:
        return
    same = (clean - corrupt).abs() <= 1e-6 * torch.maximum(clean.abs(), corrupt.abs())
    if same.any():
        warnings.warn(
            f"the metric has the same value on clean and corrupt in {int(same.sum())} of {len(same)} pairs: effects mean little there. "
            "Choose pairs or a metric between which the model tells a difference",
            stacklevel=4,
        )


def check_pattern_live(model: TransformerBridge, recording: Recording, layer: int) -> None:
    """Refuse to patch patterns whose value the model does not use (attention computed by Hugging Face)."""
    heads: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook_fn(value: Tensor, hook: Any) -> None:
            heads[name] = value

        return hook_fn

    z, pattern = (COMPONENTS[name].write_at(layer) for name in ("heads", "pattern"))
    tokens, mask = recording.tokens[:1], None if recording.mask is None else recording.mask[:1]
    for name, hooks in {"plain": [], "zeroed": [(pattern, lambda value, hook: torch.zeros_like(value))]}.items():
        with model.hooks(fwd_hooks=[*hooks, (z, keep(name))]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TransformerLens warns of some hooks that it drops; all are refused here
            forward(model, tokens, mask, recording.columns)
    if torch.equal(heads["plain"], heads["zeroed"]):
        raise RelevanceError(
            f"the pattern of block {layer} is shown but not used ({type(model.blocks[layer].attn).__name__} leaves attention to Hugging "
            "Face), so patching it would do nothing; patch q, k or heads instead"
        )


def find_shortcut(
    model: TransformerBridge, recording: Recording, patches: Sequence[Patch], *, values: Values, readout: Readout
) -> Shortcut:
    """The furthest shortcut that gives the logits of whole forward passes on some of the patches to be run.

    Families differ in what a block needs and in what happens between and after the blocks, so this is measured, not assumed. Hooks that
    the user has on the model may count positions: then no positions are skipped. Where only a few tokens' logits are read and the
    unembedding is more than a matrix, `readout.tokens` becomes None.
    """
    if not recording.calls or not all(hasattr(model, name) for name in ("ln_final", "unembed")) or len(patches) <= SAMPLES:
        return "none"
    candidates: list[Shortcut] = ["position", "layer"]
    if recording.cache is None or any(point.has_hooks(dir="fwd") for point in model.hook_dict.values()):
        candidates.remove("position")
    ordered = sorted(patches, key=lambda patch: (patch.start, patch.node.layer))
    samples = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.5, 1)]
    # norms are computed in fp32 at most, whatever the model's dtype
    precision = max(torch.finfo(recording.logits.dtype).eps, torch.finfo(torch.float32).eps)
    rounding = min(100 * precision, 0.02) * recording.logits.abs().max()
    expected: list[Tensor] = []
    batches = []
    for number, patch in enumerate(samples):
        base = torch.tensor([number % recording.n], device=recording.tokens.device)
        own = replace(patch, offset=patch.offset + number % recording.n)
        rows, edits = rows_of([own], base), edits_of([own], values, 1)
        batches.append((rows, edits))
        expected.append(run_rows(model, recording, rows, edits=edits, columns=readout.columns, shortcut="none"))

    def right(shortcut: Shortcut) -> bool:
        try:
            for (rows, edits), one in zip(batches, expected, strict=True):
                outcome = run_rows(model, recording, rows, edits=edits, columns=readout.columns, shortcut=shortcut)
                two = to_logits(model, recording, rows, outcome=outcome, readout=readout, shortcut=shortcut)
                one = one if readout.tokens is None else one[:, :, readout.tokens]
                if one.shape != two.shape or bool((one - two).abs().max() > rounding):
                    return False
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):
            return False  # the blocks of this family cannot be called on their own like this
        return True

    for tokens in dict.fromkeys((readout.tokens, None)):
        readout.tokens = tokens
        for shortcut in candidates:
            if right(shortcut):
                return shortcut
    return "none"
