"""The stacks of a model: each set of positions with the HookPoints that play a role in it, and the cuts through all of them.

A decoder, an encoder or an image classifier has one stack (`tokens`); an encoder-decoder has `encoder`, `decoder`, and `cross` for the
heads between the two. A cut is a set of HookPoints through which everything flows that reaches the target, so that relevance summed over
it accounts for the whole of it. Up to the encoder's end, a cut of an encoder-decoder is the encoder's residual stream with the decoder's
embeddings; from there on it is the decoder's residual stream with the encoder's output as the cross-attentions at and above it read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import T5BlockBridge

from lens_relevance.sites.token_sets import DECODER, ENCODER, TOKENS

CROSS = "cross"
_READ_IMAGES = ("LlavaForConditionalGeneration",)  # and add to the stream nowhere else, as some relatives do
Roles = dict[str, list[str]]  # `embeddings` (of tokens first, then of positions), `residual`, `z`, `neurons`


@dataclass(frozen=True)
class Cut:
    """One complete cut.

    Attributes:
        row: what lies between this cut and the next one, as the conservation account calls it.
        names: its HookPoints.
    """

    row: str
    names: tuple[str, ...]


@dataclass
class Stacks:
    """The stacks of one model.

    Attributes:
        roles: names of HookPoints by stack and role.
        cuts: the complete cuts, from the embeddings upward; above the last one is the target.
        grid: rows and columns of an image's patches, which are the last positions of the only stack; None without an image.
    """

    roles: dict[str, Roles] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    grid: tuple[int, int] | None = None


def one_stack(names: Roles) -> Stacks:
    """The stacks of a model with one set of positions."""
    residual, cuts = names["residual"], [Cut("embed", tuple(names["embeddings"][:1]))]
    if residual:
        rows = [*(str(i) for i in range(len(residual) - 1)), "output"]
        cuts += [Cut(row, (name,)) for row, name in zip(rows, residual, strict=True)]
    return Stacks({TOKENS: names}, cuts)


def bridge_stacks(model: TransformerBridge, embeddings: list[str]) -> Stacks:
    """The stacks of a TransformerBridge; embeddings: HookPoints of its token and position embeddings."""
    if hasattr(model, "encoder_blocks") and hasattr(model, "decoder_blocks"):
        return _encoder_decoder(model, embeddings)
    n = len(model.blocks) if hasattr(model, "blocks") else 0
    if not n:
        return one_stack(roles(embeddings=embeddings))
    blocks = [f"blocks.{i}" for i in range(n)]
    if reads_images(model):
        embeddings = [f"{blocks[0]}.hook_in"]
    found = one_stack(_block_roles(embeddings, blocks, "attn"))
    found.grid = _grid(model)
    return found


def reads_images(model: TransformerBridge) -> bool:
    """LLaVA: projected patches take the places of their tokens at the first block's input. The graph starts there, so that patches and
    words are explained alike; what made patches of the image (the vision tower and its projection) lies below and is not."""
    return type(getattr(model, "original_model", None)).__name__ in _READ_IMAGES


def _grid(model: TransformerBridge) -> tuple[int, int] | None:
    """Rows and columns of the patches of an image classifier (ViT, DeiT)."""
    patches = getattr(getattr(getattr(model, "embed", None), "original_component", None), "patch_embeddings", None)
    if patches is None:
        return None
    (height, width), (down, across) = patches.image_size, patches.patch_size
    return height // down, width // across


def roles(*, embeddings: Sequence[str] = (), residual: Sequence[str] = (), z: Sequence[str] = (), neurons: Sequence[str] = ()) -> Roles:
    """The roles of one stack."""
    return {"embeddings": list(embeddings), "residual": list(residual), "z": list(z), "neurons": list(neurons)}


def _block_roles(embeddings: Sequence[str], blocks: list[str], attention: str) -> Roles:
    """The roles of a stack of blocks whose self-attention is the child `attention`."""
    return roles(
        embeddings=embeddings,
        residual=_residual(blocks),
        z=[f"{b}.{attention}.o.hook_in" for b in blocks],
        neurons=[f"{b}.mlp.out.hook_in" for b in blocks],
    )


def _encoder_decoder(model: TransformerBridge, embeddings: list[str]) -> Stacks:
    encoder = [f"encoder_blocks.{i}" for i in range(len(model.encoder_blocks))]
    decoder = [f"decoder_blocks.{i}" for i in range(len(model.decoder_blocks))]
    if isinstance(model.encoder_blocks[0], T5BlockBridge):  # its embedding never fires, its positions are a bias on the scores
        below, beside = [f"{encoder[0]}.hook_in"], [f"{decoder[0]}.hook_in"]
    else:
        below = [name for name in embeddings if not name.startswith("decoder_")]
        beside = [name for name in embeddings if name.startswith("decoder_")]
    start = f"{decoder[0]}.hook_in"
    reads = [[f"{b}.cross_attn.k.hook_in", f"{b}.cross_attn.v.hook_in"] for b in decoder]
    cuts = [Cut("embed", (below[0], beside[0]))]
    cuts += [Cut(f"encoder {i}", (f"{b}.hook_in", start)) for i, b in enumerate(encoder)]
    cuts += [Cut("encoder output", (f"{encoder[-1]}.hook_out", start))]
    cuts += [Cut(f"decoder {i}", (f"{b}.hook_in", *(n for pair in reads[i:] for n in pair))) for i, b in enumerate(decoder)]
    cuts += [Cut("output", (f"{decoder[-1]}.hook_out",))]
    by_stack = {
        ENCODER: _block_roles(below, encoder, "attn"),
        DECODER: _block_roles(beside, decoder, "self_attn"),
        CROSS: roles(z=[f"{b}.cross_attn.o.hook_in" for b in decoder]),
    }
    return Stacks(by_stack, cuts)


def _residual(blocks: list[str]) -> list[str]:
    return [*(f"{b}.hook_in" for b in blocks), f"{blocks[-1]}.hook_out"]
