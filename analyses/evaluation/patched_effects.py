"""Activation patching over a data set: effects of every component, or of some nodes, pair by pair."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Direction, Node
from analyses.datasets.batches import rows_together
from analyses.datasets.streaming import PairStream
from analyses.patching import activation_patching
from analyses.patching.checks import check_gap
from analyses.tasks import PromptPairs
from lens_relevance.inputs.targets import as_target

# A pass of patching holds many patches anyway; with few pairs at a time the bar moves, and an interruption costs little.
_PAIRS_PATCHED = 16


def effects_of_patching(
    model: TransformerBridge, stream: PairStream, components: Sequence[str], direction: Direction
) -> tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]], np.ndarray, float]:
    """Effects [component, pair] of each kind of component, layer by layer, and where both directions were patched those of either; the gap
    between the runs, one for each pair, or one for all where the metric is one number for all; and the seconds it took."""

    def step(batch: PromptPairs) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*same value on clean and corrupt")  # said once, below, of all pairs
            patched = activation_patching(model, batch, components, direction=direction, progress=False)
        assert patched.corrupt is not None  # this is patching, not ablation
        rows = {name: [i for i, node in enumerate(patched.nodes) if node.component == name] for name in components}
        found = {name: patched.effect[rows[name]].T for name in components}
        for run in patched.runs if len(patched.runs) > 1 else ():
            found |= {f"{name}: {run.direction}": run.effect[rows[name]].T for name in components}
        return found | {"clean": patched.clean, "corrupt": patched.corrupt}

    effects_by_component, seconds = stream.collect("patching", step, "activation patching", size=_pairs_at_once(model, stream))
    clean, corrupt = effects_by_component.pop("clean"), effects_by_component.pop("corrupt")
    if stream.processes.index == 0:
        check_gap(clean, corrupt)
    found = {name: values.T.numpy() for name, values in effects_by_component.items()}
    effects = {name: found[name] for name in components}
    by_direction = {} if direction != "mean" else {name: (found[f"{name}: denoising"], found[f"{name}: noising"]) for name in components}
    return effects, by_direction, (clean - corrupt).numpy(), seconds


def effects_of_nodes(model: TransformerBridge, stream: PairStream, nodes: Sequence[Node], direction: Direction) -> np.ndarray:
    """Effects of patching nodes, [node, pair]; 0 where a pair has padding at the node's position."""

    def step(batch: PromptPairs) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*same value on clean and corrupt")
            effect = activation_patching(model, batch, list(nodes), direction=direction, progress=False).effect
        return {"effects": torch.nan_to_num(effect.T, nan=0.0)}

    name = f"patched {direction} {' '.join(map(str, nodes))}"
    found, _ = stream.collect(name, step, f"patching {len(nodes)}", size=_pairs_at_once(model, stream))
    return found["effects"].T.numpy()


def _pairs_at_once(model: TransformerBridge, stream: PairStream) -> int:
    pairs = stream.pairs  # there can be more processes than pairs
    return rows_together(model, as_target(pairs.target), pairs.clean, mask=pairs.clean_mask, size=_PAIRS_PATCHED) if len(pairs) else 1
