"""Edge level: each reader's input is rebuilt as what kept writers write now plus the replacement of what removed ones write.

All readers of a layer are rebuilt by one matrix product: x_v = stream - sum over removed u of (live_u - replacement_u). Queries, keys and
values computed from them go back into the model at q, k and v, so that rotation, masks, soft-caps and softmax are the model's own. Where
several query heads share a key-value head (GQA), each needs a key and value of its own: the batch is run once per member of a group, and
each run gives the z of its members.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits.items import Items
from analyses.circuits.runs import forward, replacements
from analyses.edges.transport import push
from analyses.edges.wiring import Layer, Wiring, linear
from analyses.tasks.pairs import PromptPairs
from lens_relevance.logit_reading import LogitReading
from lens_relevance.rules import LNRule
from lens_relevance.rules.base import working
from lens_relevance.sites import Site

Masks = Bool[Tensor, "circuit pos writer reader"]


class EdgeHooks:
    """Clean runs of some pairs, one per circuit, with each reader's input rebuilt.

    Rows are ordered by member of a group, circuit, example. Tensors of the stream are [circuit, pos, ..., example, d_model].
    """

    def __init__(self, model: TransformerBridge, wiring: Wiring, items: Items, *, pairs: PromptPairs, mean_tokens: Tensor | None) -> None:
        self.model, self.wiring, self.pairs = model, wiring, pairs
        self.place = {name: i for i, name in enumerate(items.writers)}
        self.reader = {name: i for i, name in enumerate(items.readers)}
        self.copies = max(layer.geometry.group for layer in wiring.layers)
        names = ["blocks.0.hook_in"]
        for layer in wiring.layers:
            names += [layer.z.output_name] + ([layer.mlp_write] if layer.has_mlp else [])
        self.other = replacements(model, pairs.corrupt, pairs.corrupt_mask, names=names, mean_tokens=mean_tokens)

    def bytes_per_row(self, reading: LogitReading) -> int:
        """What a row of a forward takes."""
        readers, writers = max(len(layer.attn_readers) for layer in self.wiring.layers), len(self.place)
        n_pos, config = self.pairs.clean.shape[1], self.model.cfg
        read = n_pos if reading.at is None else reading.at.shape[1]
        per_position = 4 * int(config.d_model) * (writers + 3 * readers) + writers * readers
        return n_pos * per_position + 4 * read * self.copies * int(config.d_vocab)

    def logits(self, n_circuits: int) -> Tensor:
        """Logits of the hooked model, circuit by circuit."""
        times = self.copies * n_circuits
        logits = forward(self.model, self.pairs.clean.repeat(times, 1), self.pairs.clean_mask.repeat(times, 1))
        return logits[: n_circuits * len(self.pairs)]

    @contextmanager
    def hooked(self, kept: Masks) -> Iterator[None]:
        """The model with everything outside these circuits replaced."""
        with self.model.hooks(fwd_hooks=_Rebuild(self, kept).hooks()):
            yield


class _Rebuild:
    """One forward of many circuits: what has been written so far, less its replacement."""

    def __init__(self, run: EdgeHooks, kept: Masks) -> None:
        self.run, self.removed = run, ~kept
        self.n, self.circuits, self.copies = len(run.pairs), len(kept), run.copies
        self.changes: Tensor | None = None  # [circuit, pos, writer, example, d_model]
        self.stream: Tensor | None = None
        self.queries: dict[str, Tensor] = {}

    def hooks(self) -> list[tuple[str, Any]]:
        """HookPoints and what is done at each, in the order of the forward."""
        listed: list[tuple[str, Any]] = [("blocks.0.hook_in", self._hook(self._embedded))]
        for layer in self.run.wiring.layers:
            listed.append((layer.attn_input, self._hook(self._attention_reads, layer)))
            for number, site in enumerate((layer.q, layer.k, layer.v)):
                listed.append((site.output_name, self._hook(self._give, layer, number)))
            listed.append((layer.z.output_name, self._hook(self._attention_writes, layer)))
            if layer.has_mlp:
                entry = f"{layer.path}.mlp.hook_in"
                if layer.mlp_input not in (entry, layer.attn_input):
                    listed.append((layer.mlp_input, self._hook(self._remember)))
                listed.append((entry, self._hook(self._mlp_reads, layer)))
                listed.append((layer.mlp_write, self._hook(self._mlp_writes, layer)))
        listed.append((self.run.wiring.final, self._hook(self._logits_read)))
        return listed

    @staticmethod
    def _hook(function: Any, *arguments: Any) -> Any:
        return lambda x, hook: function(x, *arguments)

    # ---- writers

    def _embedded(self, x: Tensor) -> Tensor:
        first = self._apart(x)
        shape = (self.circuits, first.shape[1], len(self.run.place), *first.shape[2:])
        self.changes = working(first).new_zeros(shape)
        self._wrote("embed", first.unsqueeze(2), self.run.other["blocks.0.hook_in"].unsqueeze(2))
        return x

    def _attention_writes(self, z: Tensor, layer: Layer) -> Tensor:
        """Members of a group take their z from their own run; every run then goes on with all of them."""
        group = layer.geometry.group
        if self.copies > 1:
            by_member = z.unflatten(0, (self.copies, -1)).unflatten(3, (-1, group))  # [copy, row, pos, group, member, d_head]
            own = torch.stack([by_member[j % self.copies, :, :, :, j] for j in range(group)], 3).flatten(2, 3)
            z = own.repeat(self.copies, 1, 1, 1)
        live = _written(layer, z[: self.circuits * self.n])
        live = live.unflatten(0, (self.circuits, self.n)).movedim(1, 3)  # [circuit, pos, head, example, d_model]
        self._wrote(layer.heads[0], live, _written(layer, self.run.other[layer.z.output_name]))
        return z

    def _mlp_writes(self, x: Tensor, layer: Layer) -> Tensor:
        self._wrote(layer.mlp_writer[0], self._apart(x).unsqueeze(2), self.run.other[layer.mlp_write].unsqueeze(2))
        return x

    def _wrote(self, first: str, live: Tensor, other: Float[Tensor, "example pos writer d_model"]) -> None:
        """Note what writers from `first` on write now, less their replacement. live: [circuit, pos, writer, example, d_model]."""
        assert self.changes is not None
        at = self.run.place[first]
        self.changes[:, :, at : at + live.shape[2]] = live - other.permute(1, 2, 0, 3).unsqueeze(0)

    # ---- readers

    def _remember(self, x: Tensor) -> Tensor:
        self.stream = x
        return x

    def _attention_reads(self, x: Tensor, layer: Layer) -> Tensor:
        self.stream = x
        read = _norm(layer.attn_norm, self._rebuilt(x, layer.attn_readers, layer))
        for number, (site, part) in enumerate(zip((layer.q, layer.k, layer.v), read.chunk(3, 2), strict=True)):
            self.queries[f"{layer.index}.{number}"] = self._project(layer, site, part, number)
        return x

    def _project(self, layer: Layer, site: Site, x: Float[Tensor, "circuit pos head example d_model"], number: int) -> Tensor:
        """q, k or v of every head, as rows [row, pos, head, d_head]; keys and values are those of each copy's member of a group."""
        op, d_head, group = linear(site), layer.geometry.d_head, layer.geometry.group
        weight = op.weight.to(x.dtype).unflatten(0, (-1, d_head))
        bias = torch.zeros_like(weight[..., 0]) if op.bias is None else op.bias.to(x.dtype).unflatten(0, (-1, d_head))
        if number > 0 and group > 1:
            weight, bias = weight.repeat_interleave(group, 0), bias.repeat_interleave(group, 0)
        out = torch.einsum("cphnd,hed->cnphe", x, weight) + bias.unsqueeze(0)
        rows = out.flatten(0, 1)
        if number == 0 or self.copies == 1:
            return rows.repeat(self.copies, 1, 1, 1)
        return torch.cat([rows.unflatten(2, (-1, group))[:, :, :, j % group] for j in range(self.copies)])

    def _give(self, x: Tensor, layer: Layer, number: int) -> Tensor:
        return self.queries.pop(f"{layer.index}.{number}").to(x.dtype)

    def _mlp_reads(self, x: Tensor, layer: Layer) -> Tensor:
        stream = x if layer.mlp_input == f"{layer.path}.mlp.hook_in" else self.stream
        assert stream is not None
        return self._together(_norm(layer.mlp_norm, self._rebuilt(stream, layer.mlp_reader, layer)), x)

    def _logits_read(self, x: Tensor) -> Tensor:
        return self._together(self._rebuilt(x, ["logits"], None), x)

    def _rebuilt(self, x: Tensor, readers: list[str], layer: Layer | None) -> Float[Tensor, "circuit pos reader example d_model"]:
        """The stream as these readers see it."""
        assert self.changes is not None
        first = self.run.reader[readers[0]]
        count = len(self.run.place)
        if layer is not None:  # writers of this layer and above have written nothing yet, or are not read
            count = self.run.place[layer.heads[0]]
            sequential = readers == layer.mlp_reader and not layer.parallel
            count += len(layer.heads) if sequential else 0
        removed = self.removed[:, :, :count, first : first + len(readers)].transpose(2, 3).to(self.changes)
        lost = removed @ self.changes[:, :, :count].flatten(3)
        return self._apart(x).unsqueeze(2) - lost.unflatten(3, (self.n, -1))

    def _apart(self, x: Tensor) -> Float[Tensor, "circuit pos example d_model"]:
        """The rows of the first copy (all have one stream) as circuits and examples."""
        return working(x[: self.circuits * self.n]).unflatten(0, (self.circuits, self.n)).transpose(1, 2)

    def _together(self, x: Float[Tensor, "circuit pos one example d_model"], like: Tensor) -> Tensor:
        return x.squeeze(2).transpose(1, 2).flatten(0, 1).repeat(self.copies, 1, 1).to(like.dtype)


def _written(layer: Layer, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row pos head d_model"]:
    """What each head writes; past a post-norm its part of the norm's output, at the scale of this run."""
    output = linear(layer.o)
    z = working(z)
    parts = torch.einsum("bphe,dhe->hbpd", z, output.weight.to(z.dtype).unflatten(1, (-1, z.shape[-1])))
    if layer.attn_post is not None:
        total = parts.sum(0) if output.bias is None else parts.sum(0) + output.bias.to(z.dtype)
        parts = push(layer.attn_post, LNRule(), total, reference=None, parts=parts)
    return parts.permute(1, 2, 0, 3)


def _norm(site: Site | None, x: Tensor) -> Tensor:
    return x if site is None else site.operation(x)
