"""What every evaluator of removals has in common: batches, and a memory of removals that recur."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance import Target
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.metrics import read_at
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.token_ids import positions
from lens_relevance.logit_reading import can_read_some, logits_at, logits_with_positions


class Removal(ABC):
    """Evaluates inputs without some of their items: (rows, removed) -> (target, whether the prediction is still that of the whole input).

    Attributes:
        baseline: what stands where an item was removed.
        batch_size: rows per forward pass.
    """

    def __init__(self, baseline: str, batch_size: int) -> None:
        self.baseline, self.batch_size = baseline, batch_size
        # methods often agree on what goes first and last, so that many removals recur
        self._known: dict[tuple[int, bytes], tuple[float, int]] = {}

    def __call__(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n item"]) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
        """(target [n], whether the most likely answer is still that of the whole input [n])."""
        keys = [(row, gone.tobytes()) for row, gone in zip(rows.tolist(), removed.cpu().numpy(), strict=True)]
        whole = {row: (row, bytes(removed.shape[1])) for row in rows.unique().tolist()}
        asked = dict(zip(keys, removed.cpu(), strict=True)) | {
            key: torch.zeros(removed.shape[1], dtype=torch.bool) for key in whole.values()
        }
        new = [key for key in asked if key not in self._known]
        if new:
            values, predictions = self._evaluate(torch.tensor([row for row, _ in new]), torch.stack([asked[key] for key in new]))
            self._known |= zip(new, zip(values.tolist(), predictions.tolist(), strict=True), strict=True)
        value = torch.tensor([self._known[key][0] for key in keys], dtype=torch.float64)
        return value, torch.tensor([self._known[key][1] == self._known[whole[key[0]]][1] for key in keys])

    def _evaluate(self, rows: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
        value, predicted = torch.empty(len(rows), dtype=torch.float64), torch.empty(len(rows), dtype=torch.long)
        for part in self.parts(rows, removed):
            with torch.no_grad():
                value[part], predicted[part] = (x.cpu() for x in self.run(rows[part], removed[part]))
        return value, predicted

    def parts(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n item"]) -> list[Int[Tensor, " _part"]]:
        """Indices of rows to run together."""
        return list(torch.arange(len(rows)).split(self.batch_size))

    @abstractmethod
    def run(self, rows: Int[Tensor, " n"], removed: Bool[Tensor, "n item"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The target [n] and the most likely answer [n] of these inputs without these items."""


def target_and_answer(model: HookedModel, target: Target, prompt: Prompt) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """The target and the most likely answer of each row; logits are computed where these two are read, and nowhere else."""
    tokens, mask = prompt.tokens, prompt.mask
    if can_read_some(model):
        metric = target.metric(model, tokens, mask)
        if metric.at is not None:
            at, last = metric.at.to(tokens.device), read_last(target, tokens, mask)
            with logits_at(model, at if torch.equal(at, last) else torch.cat([at, last], 1), tokens.shape[1]):
                logits = prompt.call(model)
            value = metric.of_read()(logits[:, : at.shape[1]])
            return value.expand(len(tokens)).double(), logits[:, -1].argmax(-1)
    logits, tokens, mask = logits_with_positions(prompt.call(model), tokens, mask)
    value = target.metric(model, tokens, mask)(logits).expand(len(tokens))
    return value.double(), read_at(logits, read_last(target, tokens, mask))[:, 0].argmax(-1)


def read_last(target: Target, tokens: Tensor, mask: Tensor) -> Int[Tensor, "n 1"]:
    """Where the answer stands: at the target's position, or the last."""
    return positions(getattr(target, "position", -1), tokens, mask).unsqueeze(1)


def one_by_one(removal: Removal, removable: Bool[Tensor, "batch item"]) -> Float[Tensor, "batch item"]:
    """Fall of the target when one item alone is removed, one forward for each; 0 for what may not be removed."""
    batch, items = removable.shape
    whole = removal(torch.arange(batch), torch.zeros(batch, items, dtype=torch.bool))[0]
    row, item = removable.cpu().nonzero(as_tuple=True)
    without = removal(row, torch.nn.functional.one_hot(item, items).bool())[0]
    result = torch.zeros(batch, items, dtype=torch.float64)
    result[row, item] = whole[row] - without
    return result
