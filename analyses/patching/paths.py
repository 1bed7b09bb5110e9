"""Path patching: the effect of one head on another head, or on the logits, along the direct paths between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, LOGITS, Component, Node, resolve_direction
from analyses.patching.checks import check_eval, check_finite, check_gap, check_pairs
from analyses.patching.patcher import Patcher
from analyses.patching.pieces import bar_if, pieces_of
from analyses.patching.plan import Patch, Values, edits_of, passes, rows_of
from analyses.patching.readout import Readout, evaluate
from analyses.patching.recording import record, take_rows
from analyses.patching.results import PatchedRuns, join_runs
from analyses.patching.selection import Selection, as_list, layers_of, nodes_of
from analyses.patching.sweep import Edits, Rows, run_rows
from analyses.tasks import PromptPairs
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import left_as_found


@dataclass(frozen=True, eq=False)
class PathPatchingResult:
    """Effects of paths.

    Attributes:
        paths: (sender, receiver) of each row of the tensors.
        run: the patched metric [path, pair], its baseline [pair] and the effect.
        clean, corrupt: the metric of the runs without patches, [pair].
    """

    paths: tuple[tuple[Node, Node], ...]
    run: PatchedRuns
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"]

    @property
    def effect(self) -> Float[Tensor, "path pair"]:
        """Effect of each path on each pair, positive where it carries what makes the clean metric larger."""
        return self.run.effect

    def to_dataframe(self) -> pd.DataFrame:
        """One row per path, averaged over pairs.

        Columns: sender_layer, sender_head, sender_position (<NA>: all), receiver (q, k, v, heads or logits), receiver_layer, receiver_head,
        receiver_position, patched, baseline, effect.
        """

        def column(side: int, name: str) -> Any:
            return pd.array([getattr(path[side], name) for path in self.paths], dtype="Int64")

        return pd.DataFrame(
            {
                **{f"sender_{name}": column(0, name) for name in ("layer", "head", "position")},
                "receiver": [receiver.component for _, receiver in self.paths],
                **{f"receiver_{name}": column(1, name) for name in ("layer", "head", "position")},
                "patched": self.run.patched.mean(1).tolist(),
                "baseline": float(self.run.baseline.mean()),
                "effect": self.effect.mean(1).tolist(),
            }
        )


@torch.no_grad()
@left_as_found
def path_patching(
    model: TransformerBridge,
    pairs: PromptPairs,
    senders: Selection,
    *,
    receivers: Selection,
    direction: Literal["denoising", "noising"] = "denoising",
    freeze: Sequence[Literal["heads", "mlps"]] = ("heads", "mlps"),
    metric: Any = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PathPatchingResult:
    """Change what one head tells another, and nothing else (Wang et al. 2022, Goldowsky-Dill et al. 2023).

    The sender is set to its value in the other run, while what `freeze` names keeps its value up to the receiver; what the receiver then
    gets is noted. In a second run the receiver alone is set to that, and everything after it is computed anew. With heads and MLPs frozen
    (the default) only the direct path through the residual stream is left, as in `transformer_lens.patching.get_act_patch_direct_path`;
    Wang et al. freeze the heads only: `freeze=("heads",)`.

    Args:
        senders: "heads" for all of them, or nodes such as "L0H3".
        receivers: "q", "k", "v" or "heads" (all three inputs of a head) for all heads in later layers, "logits", or nodes. Under
            grouped-query attention q and heads count query heads, k and v key-value heads.
        freeze: what keeps its value between sender and receiver.
        direction, metric, batch_size, progress: as in `activation_patching`.

    Raises:
        RelevanceError: as `activation_patching`, and where no receiver lies above a sender.
    """
    if resolve_direction(direction) == "mean":
        raise RelevanceError("paths are patched in one direction, denoising or noising; call path_patching for each and average")
    if unknown := set(freeze) - {"heads", "mlps"}:
        raise RelevanceError(f'what can be frozen is "heads" and "mlps", not {sorted(unknown)}')
    check_eval(model)
    check_pairs(pairs)
    to_logits = [item for item in as_list(receivers) if item == Node(LOGITS)]
    to_heads = [item for item in as_list(receivers) if item != Node(LOGITS)]
    keys = _keys(model, as_list(senders), to_heads, freeze)
    pieces = []
    with bar_if(progress) as bar:
        task = bar.add_task("path patching", total=None)
        for piece in pieces_of(model, pairs, metric, batch_size=batch_size):
            recordings = [
                record(model, ids, piece.mask, wanted=keys, with_calls=base, columns=piece.columns)
                for ids, base in ((piece.clean, direction == "noising"), (piece.corrupt, direction == "denoising"))
            ]
            check_finite(model, piece.metric, *recordings)
            base, source = recordings if direction == "noising" else recordings[::-1]
            shapes = {key: tuple(base.values[key].shape) for key in keys}
            sending = nodes_of(senders, shapes, by_position=False)
            receiving = nodes_of(to_heads, shapes, by_position=False) + [Node(LOGITS, len(model.blocks)) for _ in to_logits]
            paths = [(sender, receiver) for sender in sending for receiver in receiving if receiver.layer > sender.layer]
            if not paths:
                raise RelevanceError("no receiver lies in a layer above a sender, so there is no path between them")
            bar.update(task, total=len(paths) * -(-len(pairs.clean) // base.n))
            readout, first = Readout(piece.metric, base.logits, piece.columns), piece.first_difference()
            patcher = Patcher(model, base, readout, first, batch_size, lambda count: bar.advance(task, count))
            patched = _patched(patcher, source.values, sending, receiving, freeze)
            unpatched = [evaluate(piece.metric, recording.logits).cpu() for recording in recordings]
            baseline = unpatched[0] if direction == "noising" else unpatched[1]
            pieces.append((paths, PatchedRuns(direction, torch.stack([patched[path] for path in paths]).cpu(), baseline), unpatched))
    clean, corrupt = (torch.cat([unpatched[side] for _, _, unpatched in pieces]) for side in (0, 1))
    check_gap(clean, corrupt)
    return PathPatchingResult(tuple(pieces[0][0]), join_runs([run for _, run, _ in pieces]), clean, corrupt)


def _keys(
    model: TransformerBridge, senders: list[Component | Node], receivers: list[Component | Node], freeze: Sequence[str]
) -> list[tuple[str, int]]:
    """Every (component, layer) to record; refuses what cannot send or receive."""
    for word, items, allowed in (("from", senders, ("heads",)), ("to", receivers, ("q", "k", "v", "heads"))):
        for item in items:
            name = item.name if isinstance(item, Component) else item.component
            if name not in allowed:
                raise RelevanceError(f"paths lead from heads to q, k, v, heads or logits, not {word} {name!r}")
    heads = layers_of(model, ["heads", *senders, *receivers])
    mlps = [("mlp", i) for i in range(len(model.blocks)) if "mlps" in freeze and COMPONENTS["mlp"].read_at(i) in model.hook_dict]
    return list(dict.fromkeys(heads + mlps))


def _patched(
    patcher: Patcher, source: Values, senders: list[Node], receivers: list[Node], freeze: Sequence[str]
) -> dict[tuple[Node, Node], Float[Tensor, " n_or_1"]]:
    """The metric of each path, a group of senders at a time: what they make of the receivers, then each receiver set to that."""
    recording, n = patcher.recording, patcher.recording.n
    base = torch.arange(n, device=recording.tokens.device)

    def patch(node: Node, offset: int = 0) -> Patch:
        return Patch(node, patcher.first if node.position is None else node.position, offset)

    sending = [patch(sender) for sender in senders]
    shortcut = patcher.settle(sending, source)
    patched: dict[tuple[Node, Node], Tensor] = {}
    for group in passes(sending, recording, patcher.batch_size, shortcut=shortcut):
        rows, received = rows_of(group, base), Values()
        edits = _sending(patcher, group, rows, source, receivers, freeze, received)
        outcome = run_rows(patcher.model, recording, rows, edits=edits, columns=patcher.readout.columns, shortcut=shortcut)
        for receiver in receivers:
            if receiver.component == LOGITS:
                patched |= {(member.node, receiver): value for member, value in zip(group, patcher.read(rows, outcome), strict=True)}
                patcher.done(len(group))
        heads = [(number, sent.node, receiver) for number, sent in enumerate(group) for receiver in receivers]
        heads = [path for path in heads if path[2].layer > path[1].layer and path[2].component != LOGITS]
        if heads:
            values = patcher.metric([patch(receiver, number * n) for number, _, receiver in heads], received)
            patched |= {(sender, receiver): value for (_, sender, receiver), value in zip(heads, values, strict=True)}
    return patched


def _sending(
    patcher: Patcher, group: list[Patch], rows: Rows, source: Values, receivers: list[Node], freeze: Sequence[str], received: Values
) -> Edits:
    """Edits that set the senders, note what the receivers get (in `received`, [rows, pos, ...]), and freeze the rest."""
    base, edits = patcher.recording.values, edits_of(group, source, patcher.recording.n)

    def note(key: tuple[str, int]) -> Any:
        def edit(value: Tensor, start: int) -> None:
            if key not in received:
                received[key] = take_rows(base[key], rows.base)
            received[key][: len(value), start : start + value.shape[1]] = value

        return COMPONENTS[key[0]].write, edit

    def hold(key: tuple[str, int]) -> Any:
        def edit(value: Tensor, start: int) -> Tensor:
            return take_rows(base[key][:, start : start + value.shape[1]], rows.base[: len(value)])

        return COMPONENTS[key[0]].write, edit

    for layer in range(group[0].node.layer, len(patcher.model.blocks)):
        noted = dict.fromkeys(receiver.component for receiver in receivers if receiver.layer == layer)
        here = [note((name, layer)) for name in noted]
        held = [name for name, kind in (("heads", "heads"), ("mlp", "mlps")) if kind in freeze and (name, layer) in base]
        edits[layer] = here + [hold((name, layer)) for name in held] + edits.get(layer, [])
    return edits
