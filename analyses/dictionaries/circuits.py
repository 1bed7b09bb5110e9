"""Circuits of features: how much of the target's change the best features carry, all others set to the other run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits.items import Items
from analyses.circuits.runs import forward
from analyses.circuits.scores import RANDOM, ItemScores, random_scores
from analyses.dictionaries.ablation import feature_values
from analyses.dictionaries.comparison import estimates, points_of
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs, require_same_padding
from lens_relevance import Dictionary, RelevanceError
from lens_relevance.hooks.model_state import as_found
from lens_relevance.logit_reading import LogitReading
from lens_relevance.sites.base import block_of

_BYTES_AT_ONCE = 2**28


class FeatureAblation:
    """A model, pairs and dictionaries, ready to evaluate circuits of features; for `analyses.circuits.faithfulness_curve`.

    In the clean run every feature outside a circuit, at every position, is set to its value in the corrupt run; what the dictionaries miss
    stays, as does all that is outside of them (our reading of sparse feature circuits, Marks et al. 2024, arXiv 2403.19647, errors kept).
    A feature inside has the value that its dictionary gives it after all that was set before.

    Attributes:
        items: features that are on in either run, by name (`L9F17`).
        full, empty: the metric with every feature kept and with none, [example].

    Raises:
        RelevanceError: no pairs or dictionaries, pairs padded differently, two dictionaries in one layer, one that writes to several
            HookPoints, or features that are off in all runs.
    """

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, dictionaries: Sequence[Dictionary]) -> None:
        self.pairs = require_pairs(pairs)
        if not dictionaries or not len(pairs):
            raise RelevanceError("a circuit of features needs at least one dictionary and one pair")
        require_same_padding(pairs)
        if wide := [one for one in dictionaries if len(one.point_out) > 1]:
            raise RelevanceError(f"{wide[0]!r} writes to several HookPoints, and its features are not set one by one")
        self.model, self.dictionaries = model, list(dictionaries)
        self._points = points_of(model, dictionaries)
        layers = [block_of(out)[1] for _, out in self._points]
        if len(set(layers)) < len(layers):
            raise RelevanceError("two dictionaries write in one layer, so the names of features (L9F17) would not tell them apart")
        with torch.no_grad(), as_found(model):
            clean, self._corrupt = (feature_values(model, pairs, run, dictionaries, self._points) for run in ("clean", "corrupt"))
        on = [((a != 0) | (b != 0)).flatten(0, 1).any(0).nonzero().flatten().tolist() for a, b in zip(clean, self._corrupt, strict=True)]
        self._at = [(index, feature) for index, features in enumerate(on) for feature in features]
        names = [f"L{layers[index]}F{feature}" for index, feature in self._at]
        if not names:
            raise RelevanceError("no feature is on in any of these runs")
        numbers = np.arange(len(names))
        self.items = Items("node", pd.DataFrame({"node": names}), names, [], 1, np.stack([0 * numbers, numbers], 1))
        ends = self(torch.tensor([[True], [False]]).expand(2, len(names)))
        self.full, self.empty = ends[0], ends[1]

    def __call__(self, kept: Bool[Tensor, "circuit item"]) -> Float[Tensor, "circuit example"]:
        """The metric of each circuit on each pair, in the target's units.

        Args:
            kept: True at the features of each circuit.
        """
        self.items.check_masks(kept)
        n_pos, n = self.pairs.clean.shape[1], len(self.pairs)
        per_circuit = 4 * n * n_pos * sum(2 * one.n_features for one in self.dictionaries)
        step = max(1, _BYTES_AT_ONCE // per_circuit)
        reading = LogitReading(self.model, self.pairs.metric(self.model), n_pos)
        rows = []
        with torch.no_grad(), as_found(self.model):
            for start in range(0, len(kept), step):
                here = kept[start : start + step]
                with reading.narrow(len(here)), self.model.hooks(fwd_hooks=self._hooks(here)):
                    logits = forward(self.model, self.pairs.clean.repeat(len(here), 1), self.pairs.clean_mask.repeat(len(here), 1))
                rows += [reading.metric(logits[i * n : (i + 1) * n]).expand(n) for i in range(len(here))]
        return torch.stack(rows)

    def scores(self, method: str = "deeplift", *, seed: int = 0) -> ItemScores:
        """A score for each feature, for `faithfulness_curve` and `top`.

        Args:
            method: a ruleset, `integrated_gradients` (10 steps), or `random` (normal numbers from `seed`).

        Raises:
            RelevanceError: an unknown method.
        """
        if method == RANDOM:
            return random_scores(self.items, seed)
        found = estimates(self.model, self.pairs, self.dictionaries, method)
        values = torch.stack([found[index][:, feature] for index, feature in self._at], 1).double().cpu().numpy()
        downwards = bool(self.full.mean() < self.empty.mean())
        return ItemScores(self.items, method, values.mean(0), np.abs(values).mean(0), downwards, values)

    def _hooks(self, kept: Bool[Tensor, "circuit item"]) -> list[tuple[str, Any]]:
        """For each dictionary one that takes what it reads, and one that moves what it writes."""
        hooks = []
        for index, (dictionary, (reads, writes)) in enumerate(zip(self.dictionaries, self._points, strict=True)):
            own = [i for i, (at, _) in enumerate(self._at) if at == index]
            inside = torch.zeros(len(kept), dictionary.n_features, dtype=torch.bool)
            inside[:, [self._at[i][1] for i in own]] = kept[:, own]
            hooks += self._moved(dictionary, reads, writes, corrupt=self._corrupt[index], inside=inside)
        return hooks

    def _moved(
        self,
        dictionary: Dictionary,
        reads: str,
        writes: str,
        *,
        corrupt: Float[Tensor, "pair pos feature"],
        inside: Bool[Tensor, "circuit f"],
    ) -> list[tuple[str, Any]]:
        taken: list[Tensor] = []

        def take(x: Tensor, hook: Any) -> None:
            taken[:] = [x]

        def move(y: Tensor, hook: Any) -> Tensor:
            x = taken.pop().flatten(2).to(corrupt.dtype)
            here = dictionary.to(x)
            change = corrupt.repeat(len(inside), 1, 1) - here.written(x)
            change.masked_fill_(inside.to(x.device).repeat_interleave(len(corrupt), 0).unsqueeze(1), 0.0)
            return y + (change @ here.decoder[0]).reshape(y.shape).to(y)

        return [(reads, take), (writes, move)]
