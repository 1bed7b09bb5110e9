"""Activation patching and ablation of every component, in few passes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, Direction, Node, resolve_direction
from analyses.patching.checks import check_eval, check_finite, check_gap, check_pairs, check_pattern_live
from analyses.patching.patcher import Patcher
from analyses.patching.pieces import bar_if, pieces_of
from analyses.patching.plan import Patch, Values
from analyses.patching.readout import Readout, evaluate
from analyses.patching.recording import Recording, record
from analyses.patching.results import PatchedRuns, PatchingResult, joined
from analyses.patching.selection import Selection, layers_of, nodes_of
from analyses.tasks import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import left_as_found


@torch.no_grad()
@left_as_found
def activation_patching(
    model: TransformerBridge,
    pairs: PromptPairs,
    components: Selection = ("resid", "attn", "mlp", "heads"),
    *,
    direction: Direction = "denoising",
    by_position: bool | None = None,
    metric: Any = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Set each node of one run to its value in the other, and see how the metric moves.

    Denoising: m(corrupt run with the node set to its clean value) - m(corrupt). Noising: m(clean) - m(clean run with the node set to its
    corrupt value). Both are positive where the node carries what makes the clean metric larger. As in Meng et al. 2022 (ROME); `patched`
    of the denoising direction is what `transformer_lens.patching` returns.

    Args:
        model: in eval mode.
        pairs: a `PromptPairs`: clean and corrupt token ids [n, pos] of equal length, their masks, and a target.
        components: names (see `analyses.components`), each for all layers and heads, or single nodes (`Node`s or text such as `L3H5`).
        direction: denoising, noising, or mean (of both effects).
        by_position: patch each position on its own, or all together; None: each position for residual stream, attention and MLP outputs,
            all together for heads. Single nodes name their own position.
        metric: a target, or a callable logits [n, pos, d_vocab] -> [n] (or a scalar); None takes the pairs' target.
        batch_size: rows (patches x pairs) per forward pass; None for about 2048 tokens. Pairs are split only where the metric is a target.
        progress: show a progress bar, if standard error is a terminal.

    Returns:
        The patched metric, the baseline and the effect of each node, per pair (`effect`) and averaged (`to_dataframe`). A warning names
        the pairs on which the metric is the same on clean and corrupt.

    Raises:
        RelevanceError: a model in train mode, prompts of unequal length, an unknown component, or one that this model lacks or whose value
            it does not use.
        OutOfRangeError: a layer, head, neuron or position out of range.
    """
    resolve_direction(direction)
    check_pairs(pairs)
    keys = _prepare(model, components, batch_size)
    directions: list[Literal["denoising", "noising"]] = ["denoising", "noising"] if direction == "mean" else [direction]
    pieces = []
    with bar_if(progress) as bar:
        task = bar.add_task("activation patching", total=None)
        for piece in pieces_of(model, pairs, metric, batch_size=batch_size):
            clean = record(model, piece.clean, piece.mask, wanted=keys, with_calls="noising" in directions, columns=piece.columns)
            corrupt = record(model, piece.corrupt, piece.mask, wanted=keys, with_calls="denoising" in directions, columns=piece.columns)
            check_finite(model, piece.metric, clean, corrupt)
            _check_live(model, clean, keys)
            nodes = nodes_of(components, {key: tuple(clean.values[key].shape) for key in keys}, by_position)
            bar.update(task, total=len(nodes) * len(directions) * -(-len(pairs.clean) // clean.n))
            first, runs = piece.first_difference(), []
            for one_way in directions:
                base, source = (corrupt, clean) if one_way == "denoising" else (clean, corrupt)
                readout = Readout(piece.metric, base.logits, piece.columns)
                patcher = Patcher(model, base, readout, first, batch_size, lambda count: bar.advance(task, count))
                runs.append(_runs(one_way, patcher, nodes, _values(base, source.values)))
            m_clean, m_corrupt = (evaluate(piece.metric, recording.logits).cpu() for recording in (clean, corrupt))
            pieces.append(PatchingResult(tuple(nodes), tuple(runs), m_clean, m_corrupt, patcher.shortcut or "none"))
    result = joined(pieces)
    check_gap(result.clean, result.corrupt)
    return result


@torch.no_grad()
@left_as_found
def ablation(
    model: TransformerBridge,
    pairs: PromptPairs,
    components: Selection = ("resid", "attn", "mlp", "heads"),
    *,
    value: Literal["zero", "mean"] = "zero",
    by_position: bool | None = None,
    metric: Any = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PatchingResult:
    """Set each node of the clean run to zero, or to its mean over the clean prompts, and see how much of the metric is lost.

    Effect: m(clean) - m(clean with the node ablated). The mean is taken at each position over the pairs that have a token there, as in Wang
    et al. 2022: it keeps what all prompts share, and needs prompts that are aligned. Only the clean prompts are read.

    Args:
        value: what a node is set to.

    Other arguments, what is returned and what is raised are those of `activation_patching`.

    Raises:
        RelevanceError: a value that is neither of the two.
    """
    if value not in ("zero", "mean"):
        raise RelevanceError(f'a node is ablated to "zero" or "mean", not {value!r}')
    check_pairs(pairs)
    keys = _prepare(model, components, batch_size)
    ablated = _mean_values(model, pairs, metric, keys, batch_size) if value == "mean" else None
    pieces = []
    with bar_if(progress) as bar:
        task = bar.add_task(f"{value} ablation", total=None)
        for piece in pieces_of(model, pairs, metric, batch_size=batch_size):
            clean = record(model, piece.clean, piece.mask, wanted=keys, with_calls=True, columns=piece.columns)
            check_finite(model, piece.metric, clean)
            _check_live(model, clean, keys)
            nodes = nodes_of(components, {key: tuple(clean.values[key].shape) for key in keys}, by_position)
            bar.update(task, total=len(nodes) * -(-len(pairs.clean) // clean.n))
            new = {key: torch.zeros_like(old) if ablated is None else ablated[key].expand_as(old) for key, old in clean.values.items()}
            readout = Readout(piece.metric, clean.logits, piece.columns)
            patcher = Patcher(model, clean, readout, 0, batch_size, lambda count: bar.advance(task, count))
            runs = _runs(value, patcher, nodes, _values(clean, new))
            pieces.append(
                PatchingResult(tuple(nodes), (runs,), evaluate(piece.metric, clean.logits).cpu(), None, patcher.shortcut or "none")
            )
    return joined(pieces)


def _prepare(model: TransformerBridge, components: Selection, batch_size: int | None) -> list[tuple[str, int]]:
    """Check what can be checked before the model runs; every (component, layer) to record."""
    check_eval(model)
    if batch_size is not None and batch_size < 1:
        raise RelevanceError(f"batch_size is a number of rows per forward pass, at least 1, not {batch_size}")
    keys = layers_of(model, components)
    # resid_mid is set by what attention adds to the stream
    return keys + [("attn", layer) for name, layer in keys if name == "resid_mid" and ("attn", layer) not in keys]


def _values(base: Recording, source: Values) -> Values:
    """What nodes are set to: the values of `source`, or for the stream after attention, what attention has to add to make it so."""
    return {
        (name, layer): base.values["attn", layer] + value - base.values[name, layer] if name == "resid_mid" else value
        for (name, layer), value in source.items()
    }


def _runs(direction: str, patcher: Patcher, nodes: list[Node], values: Values) -> PatchedRuns:
    """All nodes patched in one direction; NaN where a pair has padding at the node's position."""
    patches = [Patch(node, patcher.first if node.position is None else node.position) for node in nodes]
    patched = patcher.metric(patches, values)
    recording = patcher.recording
    if recording.mask is not None and patched.shape[1] == recording.n:
        padded = [[False] * recording.n if node.position is None else (recording.mask[:, node.position] == 0).tolist() for node in nodes]
        patched = patched.masked_fill(torch.tensor(padded, device=patched.device), torch.nan)
    return PatchedRuns(direction, patched.cpu(), evaluate(patcher.readout.metric, recording.logits).cpu())


def _check_live(model: TransformerBridge, recording: Recording, keys: list[tuple[str, int]]) -> None:
    layers = [layer for name, layer in keys if name == "pattern"]
    if layers:
        check_pattern_live(model, recording, layers[0])


def _mean_values(model: TransformerBridge, pairs: PromptPairs, metric: Any, keys: list[tuple[str, int]], batch_size: int | None) -> Values:
    """Mean of each activation over the clean prompts, [1, ...], at each position over the rows that have a token there."""
    totals: Values = {}
    count: Tensor | float = 0.0
    for piece in pieces_of(model, pairs, metric, batch_size=batch_size):
        mask = (torch.ones_like(piece.clean) if piece.mask is None else piece.mask).bool()
        count = count + mask.sum(0)
        for (name, layer), value in record(model, piece.clean, piece.mask, wanted=keys, columns=piece.columns).values.items():
            at = COMPONENTS[name].axes.index("pos")
            kept = mask.to(value.device).reshape([len(mask)] + [mask.shape[1] if axis == at else 1 for axis in range(1, value.ndim)])
            totals[name, layer] = totals.get((name, layer), 0.0) + value.where(kept, 0.0).sum(0, keepdim=True)
    assert isinstance(count, Tensor)
    means: Values = {}
    for (name, layer), total in totals.items():
        at = COMPONENTS[name].axes.index("pos")
        means[name, layer] = total / count.clamp(min=1).reshape([len(count) if axis == at else 1 for axis in range(total.ndim)]).to(total)
    return means
