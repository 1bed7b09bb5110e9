"""Whisper: sound in an encoder, text in a decoder whose cross-attention reads the encoder, with HookPoints everywhere."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from lens_relevance.sites import TokenAttention, declare_sites
from lens_relevance.sites.hooked_module import HookedModule
from lens_relevance.sites.stacks import Cut
from lens_relevance.sites.token_sets import DECODER, ENCODER

CROSS = "cross"
_ENCODER, _DECODER = "model.encoder.layers", "model.decoder.layers"
_NAMES = {_ENCODER: "encoder_blocks", _DECODER: "decoder_blocks", "model.encoder.layer_norm": "encoder_ln_final"}


def hooked_whisper(model: PreTrainedModel, sound: Float[Tensor, "batch mel frame"]) -> HookedModule:
    """A Whisper ready for `propagate`, with the stacks `encoder`, `decoder` and `cross` (heads of the decoder that read the encoder).

    Relevance starts at the inputs of the two first blocks: what the convolutions made of the sound, and tokens with their positions.

    Args:
        model: in eval mode; it is changed in place.
        sound: of any content: what the model calls is seen on it.
    """
    blocks = [f"{_ENCODER}.{i}" for i in range(model.config.encoder_layers)]
    return _declared(model, sound, blocks, [*(f"{block}.hook_in" for block in blocks), f"{blocks[-1]}.hook_out"])


def hooked_decoder(model: PreTrainedModel, states: Float[Tensor, "batch frame d_model"]) -> HookedModule:
    """The decoder alone, called with encoder states in place of the sound: for anything about it at a fraction of the cost.

    Args:
        model: in eval mode; it is changed in place, and has no encoder afterwards.
        states: what `model.model.encoder` returned for any sound.
    """
    model.model.encoder = _States().eval()
    return _declared(model, states, [], ["model.encoder.hook_in"])


class _States(nn.Module):
    """In the place of the encoder: what it takes is what the encoder returned."""

    def forward(self, states: Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=states)


def _declared(model: PreTrainedModel, sound: Tensor, encoder: list[str], heard: list[str]) -> HookedModule:
    """encoder: its blocks; heard: its residual stream."""
    start = torch.full((len(sound), 1), int(model.config.decoder_start_token_id), device=sound.device)
    hooked = HookedModule(model, {"input_features": sound, "decoder_input_ids": start})
    decoder = [f"{_DECODER}.{i}" for i in range(model.config.decoder_layers)]
    written = [*(f"{block}.hook_in" for block in decoder), f"{decoder[-1]}.hook_out"]
    reads = [[f"{block}.encoder_attn.{name}_proj.hook_in" for name in "kv"] for block in decoder]
    cuts = [Cut("embed", (heard[0], written[0]))]
    cuts += [Cut(f"encoder {i}", (name, written[0])) for i, name in enumerate(heard[:-1])]
    cuts += [Cut("encoder output", (heard[-1], written[0]))]
    cuts += [Cut(f"decoder {i}", (name, *(n for pair in reads[i:] for n in pair))) for i, name in enumerate(written[:-1])]
    cuts += [Cut("output", (written[-1],))]
    declare_sites(
        hooked,
        hooked.sites(_NAMES),
        embeddings={ENCODER: heard[:1], DECODER: written[:1]},
        residual={ENCODER: heard, DECODER: written},
        z={
            ENCODER: [f"{block}.self_attn.hook_z" for block in encoder],
            DECODER: [f"{block}.self_attn.hook_z" for block in decoder],
            CROSS: [f"{block}.encoder_attn.hook_z" for block in decoder],
        },
        neurons={ENCODER: [f"{block}.fc2.hook_in" for block in encoder], DECODER: [f"{block}.fc2.hook_in" for block in decoder]},
        attentions=[_attends(block, ENCODER) for block in encoder]
        + [one for block in decoder for one in (_attends(block, DECODER), _reads(block))],
        cuts=cuts,
    )
    return hooked


def _attends(block: str, tokens: str) -> TokenAttention:
    return TokenAttention(f"{block}.self_attn.hook_pattern", f"{block}.hook_in", f"{block}.self_attn.out_proj.hook_out", tokens, tokens)


def _reads(block: str) -> TokenAttention:
    before = f"{block}.encoder_attn_layer_norm.hook_in"
    return TokenAttention(f"{block}.encoder_attn.hook_pattern", before, f"{block}.encoder_attn.out_proj.hook_out", DECODER, ENCODER)
