"""What activation patching gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.components import Node, resolve_component
from analyses.patching.sweep import Shortcut
from lens_relevance.errors import RelevanceError


@dataclass(frozen=True, eq=False)
class PatchedRuns:
    """One direction of patching.

    Attributes:
        direction: denoising (clean values set in the corrupt run), noising (corrupt values set in the clean run), zero or mean (ablation
            in the clean run).
        patched: the metric with each node patched, [node, pair]; NaN where the node's position is padding. One column where the metric
            returns a scalar.
        baseline: the metric of the same run without a patch, [pair].
    """

    direction: str
    patched: Float[Tensor, "node pair"]
    baseline: Float[Tensor, " pair"]

    @property
    def effect(self) -> Float[Tensor, "node pair"]:
        """How much the node contributes: patched - baseline when denoising, baseline - patched when noising or ablating."""
        change = self.patched - self.baseline
        return change if self.direction == "denoising" else -change


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """Effects of patching, per node and pair.

    Attributes:
        nodes: what was patched, one entry per row of the tensors.
        runs: one per direction; direction="mean" has two.
        clean, corrupt: the metric of the runs without patches, [pair]; corrupt is None for ablations.
        shortcut: what the patched runs could skip in this model: earlier positions and layers ("position"), earlier layers ("layer"), or
            "none" (whole forward passes).
    """

    nodes: tuple[Node, ...]
    runs: tuple[PatchedRuns, ...]
    clean: Float[Tensor, " pair"]
    corrupt: Float[Tensor, " pair"] | None
    shortcut: Shortcut

    @property
    def effect(self) -> Float[Tensor, "node pair"]:
        """Effect of each node on each pair; for direction="mean" the mean of both directions."""
        return torch.stack([run.effect for run in self.runs]).mean(0)

    @property
    def patched(self) -> Float[Tensor, "node pair"]:
        """The metric with each node patched; an error for direction="mean", which has two (see `runs`)."""
        return self._only_run().patched

    @property
    def baseline(self) -> Float[Tensor, " pair"]:
        """The metric of the run that was patched, before patching; an error for direction="mean", which has two (see `runs`)."""
        return self._only_run().baseline

    def _only_run(self) -> PatchedRuns:
        if len(self.runs) > 1:
            raise RelevanceError('direction="mean" patched two runs; read result.runs[0] (denoising) and result.runs[1] (noising)')
        return self.runs[0]

    def to_dataframe(self, per_pair: bool = False) -> pd.DataFrame:
        """One row per node, averaged over pairs (those that have a token there), or per node and pair.

        Columns: component, layer, position (<NA>: all), head, neuron, [pair], patched, baseline, effect. For direction="mean" there are
        patched_denoising, baseline_denoising, effect_denoising, the same for noising, and effect, the mean of both.
        """
        frame = pd.DataFrame(
            {
                "component": [node.component for node in self.nodes],
                **{
                    name: pd.array([getattr(node, name) for node in self.nodes], dtype="Int64")
                    for name in ("layer", "position", "head", "neuron")
                },
            }
        )
        n_pairs = self.effect.shape[1]
        if per_pair:
            frame = frame.loc[frame.index.repeat(n_pairs)].reset_index(drop=True)
            frame["pair"] = list(range(n_pairs)) * len(self.nodes)

        def column(values: Tensor) -> list[float]:
            return (values.flatten() if per_pair else values.double().nanmean(1)).tolist()

        for run in self.runs:
            suffix = f"_{run.direction}" if len(self.runs) > 1 else ""
            frame[f"patched{suffix}"] = column(run.patched)
            # averaged over the same pairs as `patched`
            frame[f"baseline{suffix}"] = column(run.baseline.where(~run.patched.isnan(), torch.nan))
            if suffix:
                frame[f"effect{suffix}"] = column(run.effect)
        frame["effect"] = column(self.effect)
        return frame

    def grid(self, name: str, values: str = "effect") -> pd.DataFrame:
        """One component as a table for a heatmap: layers down; heads, positions, neurons or (position, head) across.

        Args:
            name: the component.
            values: a column of `to_dataframe`.

        Raises:
            RelevanceError: the component was not patched.
        """
        frame = self.to_dataframe()
        frame = frame[frame["component"] == resolve_component(name).name]
        if frame.empty:
            raise RelevanceError(f"{name!r} was not patched; there are {', '.join(dict.fromkeys(node.component for node in self.nodes))}")
        across = [name for name in ("position", "head", "neuron") if frame[name].notna().all()]
        if not across:
            return frame.set_index("layer")[[values]]
        return frame.pivot(index="layer", columns=across if len(across) > 1 else across[0], values=values)


def joined(pieces: Sequence[PatchingResult]) -> PatchingResult:
    """Results on parts of the pairs as one; the nodes are the same in all."""
    runs = tuple(join_runs(same) for same in zip(*(piece.runs for piece in pieces), strict=True))
    clean, corrupt = torch.cat([piece.clean for piece in pieces]), [piece.corrupt for piece in pieces if piece.corrupt is not None]
    return PatchingResult(pieces[0].nodes, runs, clean, torch.cat(corrupt) if corrupt else None, pieces[0].shortcut)


def join_runs(pieces: Sequence[PatchedRuns]) -> PatchedRuns:
    """The same patches on parts of the pairs, as one."""
    patched, baseline = torch.cat([piece.patched for piece in pieces], dim=1), torch.cat([piece.baseline for piece in pieces])
    return PatchedRuns(pieces[0].direction, patched, baseline)
