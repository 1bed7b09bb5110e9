"""Node level: the output of a removed head (z), MLP or embedding is set to its replacement, in an ordinary forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits.items import Items
from analyses.circuits.runs import forward, replacements
from analyses.edges.wiring import Wiring
from analyses.tasks.pairs import PromptPairs
from lens_relevance.logit_reading import LogitReading

Masks = Bool[Tensor, "circuit pos writer"]


class NodeHooks:
    """Clean runs of some pairs, one per circuit, with what circuits leave out replaced."""

    def __init__(self, model: TransformerBridge, wiring: Wiring, items: Items, *, pairs: PromptPairs, mean_tokens: Tensor | None) -> None:
        self.model, self.wiring, self.pairs = model, wiring, pairs
        self.place = {name: i for i, name in enumerate(items.writers)}
        heads = [layer.z.output_name for layer in wiring.layers]
        mlps = [layer.mlp_output for layer in wiring.layers if layer.has_mlp]
        self.other = replacements(
            model, pairs.corrupt, pairs.corrupt_mask, names=["blocks.0.hook_in", *heads, *mlps], mean_tokens=mean_tokens
        )
        self.copies = 1

    def bytes_per_row(self, reading: LogitReading) -> int:
        """What a row of a forward takes."""
        n_pos = self.pairs.clean.shape[1]
        read = n_pos if reading.at is None else reading.at.shape[1]
        return 8 * max(read * int(self.model.cfg.d_vocab), n_pos * 8 * int(self.model.cfg.d_model))

    def logits(self, n_circuits: int) -> Tensor:
        """Logits of the hooked model, circuit by circuit."""
        return forward(self.model, self.pairs.clean.repeat(n_circuits, 1), self.pairs.clean_mask.repeat(n_circuits, 1))

    @contextmanager
    def hooked(self, kept: Masks) -> Iterator[None]:
        """The model with everything outside these circuits replaced."""
        n = len(self.pairs)
        rows = kept.repeat_interleave(n, 0).to(self.pairs.clean.device)

        def setter(name: str, where: Tensor) -> tuple[str, Any]:
            other = self.other[name]

            def hook(x: Tensor, hook: Any) -> Tensor:
                return torch.where(where, x, other.repeat(len(kept), *[1] * (other.ndim - 1)))

            return name, hook

        hooks = [setter("blocks.0.hook_in", rows[:, :, self.place["embed"]].unsqueeze(-1))]
        for layer in self.wiring.layers:
            first = self.place[layer.heads[0]]
            hooks.append(setter(layer.z.output_name, rows[:, :, first : first + len(layer.heads)].unsqueeze(-1)))
            if layer.has_mlp:
                hooks.append(setter(layer.mlp_output, rows[:, :, self.place[layer.mlp_writer[0]]].unsqueeze(-1)))
        with self.model.hooks(fwd_hooks=hooks):
            yield
