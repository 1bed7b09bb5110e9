"""Whether a ranking holds: ablate its top k components together, and as many random ones, and see how much of the metric each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.patching.nodes import COMPONENTS
from analyses.patching.pieces import pieces_of
from analyses.patching.readout import evaluate
from analyses.patching.recording import forward
from analyses.streaming import Stream
from analyses.tasks import PromptPairs

RANDOM_SETS = 10
Chosen = Sequence[tuple[int, int]]
"""Components that are ablated together, as (layer, head or neuron)."""


@dataclass(frozen=True)
class AblationCheck:
    """What it costs to set components of the clean run to their values in the corrupt run, all positions, k of them together.

    Attributes:
        k: how many components are ablated.
        gap: m(clean) - m(corrupt), mean over pairs: what there is to lose. All figures are in the units of the target.
        top: m(clean) - m(clean with the top k ablated), mean over pairs; top_error: its standard error.
        random: the same for k random components, mean over `RANDOM_SETS` sets; random_std: standard deviation over the sets.
    """

    k: int
    gap: float
    top: float
    top_error: float
    random: float
    random_std: float

    def __str__(self) -> str:
        return (
            f"ablating the top {self.k} costs {self.top:.3f} (standard error {self.top_error:.3f}) of {self.gap:.3f}, "
            f"{self.k} at random {self.random:.3f} (standard deviation over {RANDOM_SETS} draws {self.random_std:.3f})"
        )


def ablate_top(model: Any, stream: Stream, kind: Literal["z", "neuron"], ranked: Chosen, k: int) -> AblationCheck:
    """Ablation of the first k of `ranked` (all components, best first) and of random sets; the same random sets for the same model."""
    k = min(k, len(ranked))
    generator, everything = torch.Generator().manual_seed(0), sorted(ranked)
    drawn = [torch.randperm(len(everything), generator=generator)[:k].tolist() for _ in range(RANDOM_SETS)]
    sets = [list(ranked[:k]), *([everything[i] for i in draw] for draw in drawn)]
    found, _ = stream.collect(f"ablation {k}", lambda pairs: _losses(model, pairs, kind, sets), f"ablating {k} at a time")
    top, random = found["losses"][:, 0], found["losses"][:, 1:].mean(0)
    # One pair has no spread, and so no standard error.
    error = float(top.std() / len(top) ** 0.5) if len(top) > 1 else float("nan")
    return AblationCheck(k, float(found["gap"].mean()), float(top.mean()), error, float(random.mean()), float(random.std()))


@torch.no_grad()
def _losses(model: Any, pairs: PromptPairs, kind: Literal["z", "neuron"], sets: Sequence[Chosen]) -> dict[str, Tensor]:
    """What each set costs, losses [pair, set], and what there is to lose, gap [pair]."""
    (piece,) = pieces_of(model, pairs, None, len(pairs))
    # Of all components only those that some set ablates are kept: all neurons of all layers would not fit.
    needed = {layer: _indices({i for chosen in sets for at, i in chosen if at == layer}) for layer, _ in sum(map(list, sets), [])}
    kept: dict[int, Tensor] = {}

    def name(layer: int) -> str:
        return f"blocks.{layer}.{COMPONENTS[kind].write}"

    def keeper(layer: int) -> Any:
        def keep(x: Tensor, hook: Any) -> None:
            kept[layer] = x[:, :, needed[layer].to(x.device)]

        return keep

    def setter(layer: int, indices: Int[Tensor, " chosen"]) -> Any:
        def set_(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, :, indices.to(x.device)] = kept[layer][:, :, torch.searchsorted(needed[layer], indices).to(x.device)].to(x.dtype)
            return x

        return set_

    def metric(tokens: Int[Tensor, "pair pos"], hooks: list[tuple[str, Any]]) -> Float[Tensor, " pair"]:
        with model.hooks(fwd_hooks=hooks):
            return evaluate(piece.metric, forward(model, tokens, piece.mask)).expand(len(tokens))

    corrupt = metric(piece.corrupt, [(name(layer), keeper(layer)) for layer in needed])
    clean = metric(piece.clean, [])
    losses = []
    for chosen in sets:
        layers = {layer: _indices({i for at, i in chosen if at == layer}) for layer, _ in chosen}
        losses.append(clean - metric(piece.clean, [(name(layer), setter(layer, indices)) for layer, indices in layers.items()]))
    return {"losses": torch.stack(losses, 1), "gap": clean - corrupt}


def _indices(chosen: set[int]) -> Int[Tensor, " chosen"]:
    return torch.tensor(sorted(chosen))
