"""Wiring: who writes to the residual stream of a model, who reads from it, and by which HookPoints.

Writers are `embed`, `pos_embed`, each head (`L3H5`: z_h W_O^h), each MLP (`L3.mlp`, its output without the bias) and `bias`, the named sink
that holds every bias written so far. Readers are q, k and v of each query head (`L4H1.q`), each MLP's input (`L4.mlp.in`) and `logits`.
Where a dictionary stands, its features read and write (`L9F17`, the others together `L9.features`); what it misses (`L9.error`) writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import MLP_INPUT, Node
from lens_relevance.errors import CoverageError
from lens_relevance.rules import AttentionGeometry, Linear, Mix
from lens_relevance.sites import Anatomy, Site, anatomy
from lens_relevance.sites.blocks import Block

if TYPE_CHECKING:
    from analyses.edges.dictionaries import Standing


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: its sites, None where it has no such part.

    Attributes:
        attn_norm, mlp_norm: what attention and MLP read through.
        attn_post, mlp_post: what their outputs pass before they are written.
        attn_after, mlp_after: what the stream itself passes once they are (BERT).
        parallel: whether attention and MLP read the same stream.
        component: the bridge of its attention.
    """

    index: int
    attn_norm: Site | None
    attn_post: Site | None
    mlp_norm: Site | None
    mlp_post: Site | None
    attn_after: Site | None
    mlp_after: Site | None
    q: Site
    k: Site
    v: Site
    o: Site
    q_norm: Site | None
    k_norm: Site | None
    scores: Site
    pattern: Site
    z: Site
    mlp: Site | None
    mlp_in: Site | None
    mlp_gate: Site | None
    mlp_out: Site | None
    has_mlp: bool
    parallel: bool
    component: Any

    @property
    def path(self) -> str:
        """The block's name in the model."""
        return f"blocks.{self.index}"

    @cached_property
    def geometry(self) -> AttentionGeometry:
        """Shapes of its heads."""
        assert isinstance(self.z.operation, Mix)
        return self.z.operation.geometry

    @cached_property
    def heads(self) -> list[str]:
        """Names of its heads, which are writers."""
        return [str(Node("heads", self.index, head=h)) for h in range(self.geometry.n_heads)]

    @property
    def mlp_writer(self) -> list[str]:
        """Name of its MLP as a writer, if it has one."""
        return [str(Node("mlp", self.index))] if self.has_mlp else []

    @cached_property
    def attn_readers(self) -> list[str]:
        """q of every head, then k, then v."""
        return [str(Node(read, self.index, head=h)) for read in "qkv" for h in range(self.geometry.n_heads)]

    @property
    def mlp_reader(self) -> list[str]:
        """Name of its MLP's input, if it has one."""
        return [str(Node(MLP_INPUT, self.index))] if self.has_mlp else []

    @property
    def attn_input(self) -> str:
        """HookPoint of the residual stream as attention reads it."""
        return f"{self.path}.hook_in" if self.attn_norm is None else str(self.attn_norm.inputs[0].name)

    @property
    def mlp_input(self) -> str:
        """HookPoint of the residual stream as the MLP reads it."""
        return f"{self.path}.mlp.hook_in" if self.mlp_norm is None else str(self.mlp_norm.inputs[0].name)

    @property
    def attn_write(self) -> str:
        """HookPoint of what attention adds to the stream."""
        return self.o.output_name if self.attn_post is None else self.attn_post.output_name

    @property
    def mlp_output(self) -> str:
        """HookPoint of the MLP's own output. Bloom's `mlp.hook_out` holds the residual stream as well, that of its last layer does not."""
        return f"{self.path}.mlp.hook_out" if self.mlp_out is None else self.mlp_out.output_name

    @property
    def mlp_write(self) -> str:
        """HookPoint of what the MLP adds to the stream."""
        return self.mlp_output if self.mlp_post is None else self.mlp_post.output_name

    @property
    def mlp_bias(self) -> Tensor | None:
        """The bias that the MLP writes, if any."""
        return None if self.mlp_out is None else linear(self.mlp_out).bias


@dataclass(frozen=True, eq=False)
class Wiring:
    """The residual stream of one model.

    Attributes:
        layers: its blocks.
        positions: HookPoint of learned position embeddings, if any.
        embed_norm: what the embeddings pass, if anything.
        final: HookPoint of the stream that the output head reads.
        dictionaries: those that stand in it.
    """

    body: Anatomy
    layers: list[Layer]
    positions: str | None
    embed_norm: Site | None
    final: str
    dictionaries: tuple[Standing, ...] = ()

    @property
    def sources(self) -> list[str]:
        """Writers below the first block, and the bias."""
        return ["embed"] + ([] if self.positions is None else ["pos_embed"]) + ["bias"]

    @property
    def writers(self) -> list[str]:
        """In the order in which they write, so that what a reader can read is a prefix."""
        return self.sources + [name for _, names in self._steps() for name in names]

    @property
    def readers(self) -> list[str]:
        """In the order in which they read; `logits` last."""
        return [name for names, _ in self._steps() for name in names] + ["logits"]

    def available(self) -> dict[str, int]:
        """How many of `writers` each reader can read, in a model without dictionaries."""
        count = len(self.sources)
        counts: dict[str, int] = {}
        for readers, writers in self._steps():
            counts |= dict.fromkeys(readers, count)
            count += len(writers)
        for layer in self.layers:
            if layer.parallel:  # its MLP reads what its attention reads
                counts |= dict.fromkeys(layer.mlp_reader, counts[layer.attn_readers[0]])
        return counts | {"logits": count}

    def replaces_mlp(self, layer: Layer) -> bool:
        """Whether transcoders write what the MLP of a layer would."""
        return any(index == layer.index for one in self.dictionaries if one.stage == "mlp" for _, index, _ in one.points_out)

    def _steps(self) -> Iterator[tuple[list[str], list[str]]]:
        """Who reads and then writes, in the order of computation."""
        at = {(one.layer, one.stage): (one.readers, one.writers) for one in self.dictionaries}
        nothing: tuple[list[str], list[str]] = ([], [])
        for layer in self.layers:
            yield at.get((layer.index, "in"), nothing)
            yield layer.attn_readers, layer.heads
            yield at.get((layer.index, "attn"), nothing)
            yield at.get((layer.index, "mlp"), nothing) if self.replaces_mlp(layer) else (layer.mlp_reader, layer.mlp_writer)
            yield at.get((layer.index, "after_mlp"), nothing)
            yield at.get((layer.index, "out"), nothing)


def linear(site: Site) -> Linear:
    """The linear operation of a site."""
    assert isinstance(site.operation, Linear)
    return site.operation


def wiring(model: TransformerBridge) -> Wiring:
    """The wiring of a model whose every component has sites.

    Raises:
        CoverageError: a component without a site, or a model without one stack of blocks.
    """
    model_anatomy = anatomy(model)
    if model_anatomy.uncovered:
        raise CoverageError(f"edges need every component to have a site: {next(iter(model_anatomy.uncovered.values()))}")
    if not model_anatomy.blocks:
        raise CoverageError("edges need a TransformerBridge with one stack of blocks (model.blocks); encoder-decoder models have two")
    sites = {site.name: site for site in model_anatomy.sites}
    positions = next((leaf for leaf in model_anatomy.leaves[1:] if leaf.startswith("pos")), None)
    layers = [_layer(i, block, sites) for i, block in enumerate(model_anatomy.blocks)]
    return Wiring(model_anatomy, layers, positions, sites.get("embed_ln"), f"blocks.{model_anatomy.n_layers - 1}.hook_out")


def _layer(index: int, block: Block, sites: dict[str, Site]) -> Layer:
    path = block.path

    def find(*names: str) -> Site | None:
        return next((sites[f"{path}.{n}"] for n in names if f"{path}.{n}" in sites), None)

    def need(name: str) -> Site:
        site = find(name)
        if site is None:
            raise CoverageError(
                f"{path} has no site {name!r} (its attention is a {block.attention}), so the edges into single heads cannot be told apart"
            )
        return site

    attn_norm, mlp_norm, mlp_post = find("ln1"), find("ln2"), find("ln2_post")
    after: tuple[Site | None, Site | None] = (None, None)
    if block.norms_follow:
        after, attn_norm, mlp_norm = (attn_norm, mlp_norm), None, None
    if mlp_norm is None and block.parallel and mlp_post is None:  # GPT-J, Phi: one norm for both
        mlp_norm = attn_norm
    return Layer(
        index=index,
        attn_norm=attn_norm,
        attn_post=find("ln1_post"),
        mlp_norm=mlp_norm,
        mlp_post=mlp_post,
        attn_after=after[0],
        mlp_after=after[1],
        q=need("attn.q"),
        k=need("attn.k"),
        v=need("attn.v"),
        o=need("attn.o"),
        q_norm=find("attn.q_norm"),
        k_norm=find("attn.k_norm"),
        scores=need("attn:scores"),
        pattern=need("attn:pattern"),
        z=need("attn:z"),
        mlp=find("mlp"),
        mlp_in=find("mlp.in", "mlp.input"),
        mlp_gate=find("mlp.gate"),
        mlp_out=find("mlp.out"),
        has_mlp=block.has_mlp,
        parallel=block.parallel,
        component=need("attn:scores").component,
    )


def points(wired: Wiring, flows: bool) -> list[str]:
    """HookPoints whose activations and coefficients edges need; `flows`: also those of the flows inside heads and MLPs."""
    names = ["blocks.0.hook_in", wired.final]
    names += [] if wired.positions is None else [wired.positions]
    names += _inputs(wired.embed_norm)
    for layer in wired.layers:
        names += [layer.attn_input, layer.attn_write, layer.q.output_name, layer.k.output_name, layer.v.output_name, layer.z.output_name]
        names += _inputs(layer.attn_post)
        for norm in (layer.attn_after, layer.mlp_after):
            names += [] if norm is None else [*_inputs(norm), norm.output_name]
        if flows or layer.geometry.group > 1:
            names += [layer.pattern.output_name, *_inputs(layer.scores), *_inputs(layer.pattern)]
            names += [*_inputs(layer.k_norm), *([] if layer.k_norm is None else [layer.k_norm.output_name])]
        if layer.has_mlp and wired.replaces_mlp(layer):
            names.append(layer.mlp_input)
        elif layer.has_mlp:
            names += [layer.mlp_input, f"{layer.path}.mlp.hook_in", layer.mlp_output, layer.mlp_write, *_inputs(layer.mlp_post)]
            if flows and layer.mlp is not None:
                names += [*_inputs(layer.mlp), layer.mlp.output_name]
    names += [name for one in wired.dictionaries for name in one.points]
    names += ["unembed.hook_out"] if flows else []
    return list(dict.fromkeys(names))


def _inputs(site: Site | None) -> Sequence[str]:
    """HookPoints of a site's inputs that carry relevance (cos and sin do not)."""
    return [] if site is None else [str(p.name) for p in site.inputs[: site.operation.n_relevant]]
