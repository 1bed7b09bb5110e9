"""A small two-stage vision-language model in the manner of CLIPmapper (Huang et al. 2023, arXiv 2308.10240; only its abstract was at hand).

An image encoder and a text encoder, trained to match pictures and captions, and a mapper that answers questions: question tokens attend to
each other and to the image's patches. Every operation lies between HookPoints and is declared (lens_relevance.sites.declare_sites), so
every ruleset runs on it.

    image_encoder   patches -> blocks of self-attention -> norm   --------------------+  (memory)
    text_encoder    words   -> blocks of self-attention -> norm -> mapper: blocks of self-attention, cross-attention, MLP -> norm -> answers
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.HookedRootModule import HookedRootModule

from analyses.vision_language.pictures import N_PATCHES, PATCH
from analyses.vision_language.questions import ANSWERS, LONGEST, VOCABULARY
from lens_relevance.sites import TokenAttention, activation, attention, declare_sites, linear, norm
from lens_relevance.sites.declared import DeclaredSite

IMAGE, QUESTION = "image", "question"  # the two token sets, named as the arguments of the model
D_MODEL, N_HEADS, D_MLP = 48, 4, 128
D_HEAD = D_MODEL // N_HEADS
IMAGE_LAYERS, TEXT_LAYERS, MAPPER_LAYERS = 2, 1, 2


class Norm(nn.LayerNorm):
    """LayerNorm between two HookPoints."""

    def __init__(self) -> None:
        super().__init__(D_MODEL)
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """The normalised tokens."""
        return self.hook_out(super().forward(self.hook_in(x)))


class Attention(nn.Module):
    """Attention of one token set to a source, which may be itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D_MODEL, D_MODEL) for _ in range(4))
        self.hook_in, self.hook_source, self.hook_q, self.hook_k, self.hook_v = (HookPoint() for _ in range(5))
        self.hook_scores, self.hook_pattern, self.hook_z, self.hook_out = (HookPoint() for _ in range(4))

    def forward(
        self, x: Float[Tensor, "batch pos d"], source: Float[Tensor, "batch src d"], real: Bool[Tensor, "batch src"] | None = None
    ) -> Float[Tensor, "batch pos d"]:
        """What attention writes.

        Args:
            real: which sources may be read; None for all.
        """
        x, source = self.hook_in(x), self.hook_source(source)
        rows = self.hook_q(self.q(x)), self.hook_k(self.k(source)), self.hook_v(self.v(source))
        q, k, v = (row.unflatten(-1, (N_HEADS, D_HEAD)).transpose(1, 2) for row in rows)
        scores = q @ k.mT * D_HEAD**-0.5
        if real is not None:
            scores = scores.masked_fill(~real[:, None, None], float("-inf"))
        pattern = self.hook_pattern(self.hook_scores(scores).softmax(-1))
        return self.hook_out(self.o(self.hook_z((pattern @ v).transpose(1, 2).flatten(-2))))


class MLP(nn.Module):
    """A hidden layer of GELUs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MLP, D_MODEL)
        self.hook_in, self.hook_pre, self.hook_post, self.hook_out = (HookPoint() for _ in range(4))

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """What the MLP writes."""
        hidden = nn.functional.gelu(self.hook_pre(self.up(self.hook_in(x))))
        return self.hook_out(self.down(self.hook_post(hidden)))


class Block(nn.Module):
    """Self-attention, cross-attention where the block `reads` a memory, and an MLP, each behind its norm."""

    def __init__(self, reads: bool = False) -> None:
        super().__init__()
        self.ln1, self.attn, self.ln2, self.mlp = Norm(), Attention(), Norm(), MLP()
        self.hook_in = HookPoint()
        if reads:
            self.ln_cross, self.cross_attn, self.hook_mid = Norm(), Attention(), HookPoint()

    def forward(
        self,
        x: Float[Tensor, "batch pos d"],
        real: Bool[Tensor, "batch pos"] | None = None,
        memory: Float[Tensor, "batch src d"] | None = None,
    ) -> Float[Tensor, "batch pos d"]:
        """The tokens after the block."""
        x = self.hook_in(x)
        normed = self.ln1(x)
        x = x + self.attn(normed, normed, real)
        if memory is not None:
            x = self.hook_mid(x)
            x = x + self.cross_attn(self.ln_cross(x), memory)
        return x + self.mlp(self.ln2(x))


class PatchEmbed(nn.Linear):
    """A picture cut into patches, each row by row and colour last, and one vector for each."""

    def __init__(self) -> None:
        super().__init__(3 * PATCH * PATCH, D_MODEL)

    def forward(self, image: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch patch d"]:
        """One vector for each patch."""
        return super().forward(rearrange(image, "b c (y p) (x q) -> b (y x) (p q c)", p=PATCH, q=PATCH))


class Encoder(nn.Module):
    """Blocks of self-attention over embeddings with learned positions, and a norm."""

    def __init__(self, embed: nn.Module, n_positions: int, n_layers: int) -> None:
        super().__init__()
        self.embed, self.pos_embed = embed, nn.Parameter(torch.randn(n_positions, D_MODEL) * 0.1)
        self.blocks, self.ln_final = nn.ModuleList(Block() for _ in range(n_layers)), Norm()
        self.hook_embed, self.hook_pos_embed = HookPoint(), HookPoint()

    def forward(self, inputs: Tensor, real: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos d"]:
        """The encoded tokens.

        Args:
            inputs: what `embed` takes, words [batch, pos] or pictures [batch, 3, side, side].
        """
        x = self.hook_embed(self.embed(inputs))
        x = x + self.hook_pos_embed(self.pos_embed[: x.shape[1]].expand_as(x))
        for block in self.blocks:
            x = block(x, real)
        return self.ln_final(x)


class Mapper(nn.Module):
    """Blocks in which question tokens attend to each other and to the patches, and logits of the answers at the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.ln_final = nn.ModuleList(Block(reads=True) for _ in range(MAPPER_LAYERS)), Norm()
        self.unembed, self.hook_logits = nn.Linear(D_MODEL, len(ANSWERS)), HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d"], memory: Float[Tensor, "batch src d"]) -> Float[Tensor, "batch 1 answer"]:
        """Logits of the answers."""
        for block in self.blocks:
            x = block(x, None, memory)
        return self.hook_logits(self.unembed(self.ln_final(x[:, -1:])))


class VisionLanguageModel(HookedRootModule):
    """Answers questions about pictures. The answer is read at the last word, the question mark.

    forward(image [batch, 3, side, side], question [batch, word]) -> logits [batch, 1, answer], in the order of `questions.ANSWERS`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = Encoder(PatchEmbed(), N_PATCHES, IMAGE_LAYERS)
        self.text_encoder = Encoder(nn.Embedding(len(VOCABULARY), D_MODEL), LONGEST, TEXT_LAYERS)
        self.mapper = Mapper()
        self.setup()
        _declare(self)

    def forward(self, image: Float[Tensor, "batch 3 side side"], question: Int[Tensor, "batch word"]) -> Float[Tensor, "batch 1 answer"]:
        """Logits of the answers to a question about a picture."""
        return self.mapper(self.text_encoder(question), self.image_encoder(image))


def _declare(model: VisionLanguageModel) -> None:
    """Tell lens_relevance where every operation has its HookPoints, and which tokens attend to which."""
    sites = [site for name, module in model.named_modules() for site in _sites(name, module)]
    encoders = {IMAGE: "image_encoder", QUESTION: "text_encoder"}
    leaves = {tokens: [f"{encoder}.hook_embed", f"{encoder}.hook_pos_embed"] for tokens, encoder in encoders.items()}
    attentions = []
    for tokens, part, n_layers in (
        (IMAGE, "image_encoder", IMAGE_LAYERS),
        (QUESTION, "text_encoder", TEXT_LAYERS),
        (QUESTION, "mapper", MAPPER_LAYERS),
    ):
        for layer in range(n_layers):
            block = f"{part}.blocks.{layer}"
            attentions.append(TokenAttention(f"{block}.attn.hook_pattern", f"{block}.hook_in", f"{block}.attn.hook_out", tokens, tokens))
            if part == "mapper":
                cross = f"{block}.cross_attn"
                attentions.append(TokenAttention(f"{cross}.hook_pattern", f"{block}.hook_mid", f"{cross}.hook_out", QUESTION, IMAGE))
    declare_sites(model, sites, embeddings=leaves, attentions=attentions)


def _sites(name: str, module: nn.Module) -> Iterator[DeclaredSite]:
    """The sites of one component; its HookPoints are named after it."""
    at = f"{name}.hook_"
    if isinstance(module, Norm):
        yield from norm(name, f"{at}in", f"{at}out", weight=module.weight, bias=module.bias, eps=module.eps)
    elif isinstance(module, Attention):
        yield from attention(
            name,
            f"{at}q",
            f"{at}k",
            hook_v=f"{at}v",
            hook_scores=f"{at}scores",
            hook_pattern=f"{at}pattern",
            hook_z=f"{at}z",
            n_heads=N_HEADS,
            d_head=D_HEAD,
        )
        for part, source, result in (("q", "in", "q"), ("k", "source", "k"), ("v", "source", "v"), ("o", "z", "out")):
            yield from _linear(f"{name}.{part}", at + source, at + result, getattr(module, part))
    elif isinstance(module, MLP):
        yield from activation(name, f"{at}pre", f"{at}post", function=nn.functional.gelu)
        yield from _linear(f"{name}.up", f"{at}in", f"{at}pre", module.up)
        yield from _linear(f"{name}.down", f"{at}post", f"{at}out", module.down)
    elif isinstance(module, Mapper):
        yield from _linear("unembed", f"{name}.ln_final.hook_out", f"{at}logits", module.unembed)


def _linear(name: str, hook_in: str, hook_out: str, layer: nn.Linear) -> list[DeclaredSite]:
    return linear(name, hook_in, hook_out, weight=layer.weight, bias=layer.bias)
