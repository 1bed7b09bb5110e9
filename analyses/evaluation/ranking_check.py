"""Whether a ranking holds: ablate its top k components together, and as many random ones, and see how much of the metric each costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Component
from analyses.datasets.streaming import PairStream
from analyses.patching.pieces import pieces_of
from analyses.patching.readout import evaluate
from analyses.patching.recording import forward
from analyses.tasks import PromptPairs

RANDOM_SETS = 10
Chosen = Sequence[tuple[int, int]]
"""Components that are ablated together, as (layer, head or neuron)."""
Replacement = Literal["corrupt", "mean"]
"""What ablated components are set to: their values in the corrupt run, or their mean over the clean prompts, position by position."""


@dataclass(frozen=True)
class AblationCheck:
    """What it costs to set components of the clean run to other values, at all positions, k of them together.

    Attributes:
        k: how many components are ablated; replacement: to what (see `Replacement`).
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
    replacement: Replacement = "corrupt"

    def __str__(self) -> str:
        to = "" if self.replacement == "corrupt" else " (to their mean over the clean prompts)"
        return (
            f"ablating the top {self.k}{to} costs {self.top:.3f} (standard error {self.top_error:.3f}) of {self.gap:.3f}, "
            f"{self.k} at random {self.random:.3f} (standard deviation over {RANDOM_SETS} draws {self.random_std:.3f})"
        )


def ablate_top(
    model: TransformerBridge, stream: PairStream, kind: Component, *, ranked: Chosen, k: int, replacement: Replacement = "corrupt"
) -> AblationCheck:
    """Ablation of the first k of `ranked` (all components, best first) and of random sets; the same random sets for the same model.

    The mean is taken over all pairs, of all processes, at each position over the prompts that have a token there (Wang et al. 2022): it
    keeps what all prompts share, and needs prompts that are aligned.
    """
    k = min(k, len(ranked))
    generator, everything = torch.Generator().manual_seed(0), sorted(ranked)
    drawn = [torch.randperm(len(everything), generator=generator)[:k].tolist() for _ in range(RANDOM_SETS)]
    sets = [list(ranked[:k]), *([everything[i] for i in draw] for draw in drawn)]
    # Of all components only those that some set ablates are kept: all neurons of all layers would not fit.
    needed = {layer: _indices(i for chosen in sets for at, i in chosen if at == layer) for layer in sorted({at for at, _ in sum(sets, [])})}
    means = None
    if replacement == "mean":
        sums = stream.fold(
            _Sums, lambda pairs: _clean_values(model, pairs, kind, needed), "mean over the clean prompts", name="clean-values"
        )
        means = _split(sums.mean(), kind, needed)
    results, _ = stream.collect(
        f"ablation {replacement} {k}", lambda pairs: _losses(model, pairs, kind, sets, needed, means), f"ablating {k} at a time"
    )
    top, random = results["losses"][:, 0], results["losses"][:, 1:].mean(0)
    # One pair has no spread, and so no standard error.
    error = float(top.std() / len(top) ** 0.5) if len(top) > 1 else float("nan")
    return AblationCheck(k, float(results["gap"].mean()), float(top.mean()), error, float(random.mean()), float(random.std()), replacement)


Values = dict[int, Float[Tensor, "pair pos ..."]]
"""Layer -> the values of its components that are needed, [pair, pos, component, (d_head)]."""


@torch.no_grad()
def _losses(
    model: TransformerBridge, pairs: PromptPairs, kind: Component, sets: Sequence[Chosen], needed: dict[int, Tensor], means: Values | None
) -> dict[str, Tensor]:
    """What each set costs, losses [pair, set], and what there is to lose, gap [pair]."""
    (piece,) = pieces_of(model, pairs, None, batch_size=len(pairs))
    new = means or {}

    def setter(layer: int, indices: Int[Tensor, " chosen"]) -> Any:
        def set_(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            x[:, :, indices.to(x.device)] = new[layer].to(x)[:, :, torch.searchsorted(needed[layer], indices).to(x.device)]
            return x

        return kind.write_at(layer), set_

    def metric(tokens: Int[Tensor, "pair pos"], hooks: list[tuple[str, Any]]) -> Float[Tensor, " pair"]:
        with model.hooks(fwd_hooks=hooks):
            return evaluate(piece.metric, forward(model, tokens, piece.mask, piece.columns)).expand(len(tokens))

    corrupt = metric(piece.corrupt, [] if means else _keepers(kind, needed, new))
    clean = metric(piece.clean, [])
    losses = []
    for chosen in sets:
        layers = {layer: _indices(i for at, i in chosen if at == layer) for layer, _ in chosen}
        losses.append(clean - metric(piece.clean, [setter(layer, indices) for layer, indices in layers.items()]))
    return {"losses": torch.stack(losses, 1), "gap": clean - corrupt}


class _Sums:
    """Sums over prompts of what is kept at each position, [pos, value], the last value being 1 where a prompt has a token."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, scores: Float[Tensor, "pair pos value"]) -> None:
        """Take in the values of a batch."""
        self.merge({"sums": scores.double().sum(0)})

    def state(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {} if self._sums is None else {"sums": self._sums}

    def merge(self, state: dict[str, Tensor]) -> None:
        """Take in the sums of other prompts."""
        self._sums = state["sums"] if self._sums is None else self._sums + state["sums"]

    def mean(self) -> Float[Tensor, "pos value"]:
        """The mean over the prompts that have a token at each position."""
        assert self._sums is not None
        return self._sums[:, :-1] / self._sums[:, -1:].clamp(min=1)


@torch.no_grad()
def _clean_values(
    model: TransformerBridge, pairs: PromptPairs, kind: Component, needed: dict[int, Tensor]
) -> Float[Tensor, "pair pos value"]:
    """What `_Sums` takes in of a batch."""
    (piece,) = pieces_of(model, pairs, None, batch_size=len(pairs))
    kept: Values = {}
    with model.hooks(fwd_hooks=_keepers(kind, needed, kept)):
        forward(model, piece.clean, piece.mask, piece.columns)
    real = (torch.ones_like(piece.clean) if piece.mask is None else piece.mask).cpu().unsqueeze(2)
    values = torch.cat([kept[layer].flatten(2).double().cpu() for layer in needed], 2)
    return torch.cat([values.where(real.bool(), 0.0), real.double()], 2)


def _split(mean: Float[Tensor, "pos value"], kind: Component, needed: dict[int, Tensor]) -> Values:
    """The mean by layer, in the shape of what is kept there."""
    width = mean.shape[1] // sum(len(indices) for indices in needed.values())
    parts = mean.split([len(indices) * width for indices in needed.values()], 1)
    shape = [-1] if kind.index == "neuron" else [-1, width]
    return {layer: part.unflatten(1, shape).unsqueeze(0) for layer, part in zip(needed, parts, strict=True)}


def _keepers(kind: Component, needed: dict[int, Tensor], kept: Values) -> list[tuple[str, Any]]:
    """Hooks that keep the needed components of each layer in `kept`."""

    def keeper(layer: int) -> Any:
        def keep(x: Tensor, hook: Any) -> None:
            kept[layer] = x[:, :, needed[layer].to(x.device)]

        return kind.write_at(layer), keep

    return [keeper(layer) for layer in needed]


def _indices(chosen: Iterable[int]) -> Int[Tensor, " chosen"]:
    return torch.tensor(sorted(set(chosen)))
