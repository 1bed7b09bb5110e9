"""Ablate-outside evaluation: the metric of a model in which everything outside a circuit has its corrupt (or mean) value.

Many circuits are evaluated in one forward, as rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits.edge_ablation import EdgeHooks
from analyses.circuits.items import Items, Level, list_items
from analyses.circuits.node_ablation import NodeHooks
from analyses.circuits.runs import forward
from analyses.datasets.batches import rows_together
from analyses.edges.wiring import wiring
from analyses.tasks.pairs import PromptPairs, require_same_padding
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.finite import check_target
from lens_relevance.hooks.model_state import as_found, check_model
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.targets import as_target
from lens_relevance.logit_reading import LogitReading

Replacement = Literal["corrupt", "mean"]
BYTES_AT_ONCE = 2**26  # more is slower: the pages are fresh each time
_TOLERANCE = 1e-2


class Ablation:
    """A model and prompt pairs, ready to evaluate circuits.

    Args:
        level: `node` sets the output of a removed head, MLP or embedding to its replacement; `edge` rebuilds the input of each reader as
            what kept writers write now plus the replacement of what removed ones write. With a post-norm (Gemma2, OLMo2) a head's edge
            carries its part of the norm's output at the scale of the run.
        by_position: items at each position on their own, for prompts of one template.
        replacement: `corrupt`: values of the paired corrupt run. `mean`: values averaged over `mean_tokens`, position by position.
        mean_tokens: token ids [n, pos] of the prompts to average over.
        bytes_at_once: memory for the circuits that are evaluated in one forward.

    Attributes:
        items: all there is to keep.
        full, empty: the metric with every item kept and with none, [example].

    Raises:
        RelevanceError: no pairs, pairs padded differently, arguments that do not go together, or a model that is not itself with every item
            kept (or is not its corrupt run with none).
        CoverageError: a model whose residual stream is not the sum of what its components write.
    """

    def __init__(
        self,
        model: TransformerBridge,
        pairs: PromptPairs,
        level: Level = "edge",
        *,
        by_position: bool = False,
        replacement: Replacement = "corrupt",
        mean_tokens: Int[Tensor, "n pos"] | None = None,
        bytes_at_once: int = BYTES_AT_ONCE,
    ) -> None:
        if level not in ("node", "edge"):
            raise RelevanceError(f"level is 'node' or 'edge', got {level!r}")
        if (replacement == "mean") != (mean_tokens is not None):
            raise RelevanceError("mean_tokens go with replacement='mean', which needs them")
        if len(pairs) == 0:
            raise RelevanceError("there are no prompt pairs to evaluate on")
        require_same_padding(pairs)
        check_model(model)
        self.model, self.pairs, self.wiring = model, pairs, wiring(model)
        if level == "edge" and any(layer.attn_after is not None for layer in self.wiring.layers):
            raise CoverageError(
                "this model normalizes the residual stream itself after every sublayer, so a reader's input is not the sum of what was "
                "written and cannot be rebuilt edge by edge; use level='node'"
            )
        pos = pairs.clean.shape[1]
        if mean_tokens is not None and mean_tokens.shape[1] != pos:
            raise RelevanceError(
                f"mean_tokens have {mean_tokens.shape[1]} positions, the prompts {pos}; means are taken position by position"
            )
        self.mean_tokens, self.bytes_at_once = mean_tokens, bytes_at_once
        self.items: Items = list_items(self.wiring, level, pos if by_position else None)
        hooks = NodeHooks if level == "node" else EdgeHooks
        with torch.no_grad():
            self._runs = [hooks(model, self.wiring, self.items, pairs=batch, mean_tokens=mean_tokens) for batch in self._batches()]
        ends = self(torch.tensor([[True], [False]]).expand(2, len(self.items)))
        self.full, self.empty = ends[0], ends[1]
        self._check("every", self.full, pairs.clean, pairs.clean_mask)
        if mean_tokens is None:
            self._check("no", self.empty, pairs.corrupt, pairs.corrupt_mask)

    def __call__(self, kept: Bool[Tensor, "circuit item"]) -> Float[Tensor, "circuit example"]:
        """The metric of each circuit on each pair, in the target's units.

        Args:
            kept: True at the items of each circuit.
        """
        self.items.check_masks(kept)
        columns = []
        with as_found(self.model), torch.no_grad():
            for run in self._runs:
                reading = LogitReading(self.model, run.pairs.metric(self.model), run.pairs.clean.shape[1])
                step = max(1, self.bytes_at_once // (run.bytes_per_row(reading) * len(run.pairs)))
                rows = [self._metrics(run, kept[i : i + step], reading, len(run.pairs)) for i in range(0, len(kept), step)]
                columns.append(torch.cat(rows))
        return torch.cat(columns, 1)

    def _batches(self) -> Iterator[PromptPairs]:
        """Pairs in pieces of which at least two circuits fit at once."""
        pairs = self.pairs
        return pairs.batches(rows_together(self.model, as_target(pairs.target), pairs.clean, mask=pairs.clean_mask, size=16))

    def _metrics(self, run: NodeHooks | EdgeHooks, kept: Tensor, reading: LogitReading, n: int) -> Tensor:
        with run.hooked(self.items.spread(kept)), reading.narrow(run.copies * len(kept)):
            logits = run.logits(len(kept))
        return torch.stack([reading.metric(logits[i * n : (i + 1) * n]).expand(n) for i in range(len(kept))])

    def _check(self, how_many: str, rebuilt: Float[Tensor, " example"], tokens: Tensor, mask: Tensor) -> None:
        """With everything kept the rebuilt model must be the model on the clean prompts, with nothing kept on the corrupt ones."""
        parts, start = [], 0
        with torch.no_grad():
            for run in self._runs:
                rows = slice(start, start := start + len(run.pairs))
                reading = LogitReading(self.model, run.pairs.metric(self.model), tokens.shape[1])
                with reading.narrow():
                    logits = forward(self.model, tokens[rows], mask[rows])
                parts.append(reading.metric(logits).expand(len(run.pairs)))
        true = torch.cat(parts)
        check_target(true, self.model, Prompt(tokens, mask), what="the metric")
        gap = float((rebuilt - true).abs().max())
        if not gap <= _TOLERANCE * max(1.0, float(true.abs().max())):
            raise RelevanceError(
                f"with {how_many} item kept the metric is {gap:.1e} off the model's, so its inputs cannot be rebuilt from its parts"
            )
