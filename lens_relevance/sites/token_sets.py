"""Which set of tokens attends to which, in the order in which a model computes it: what token-to-token relevance accumulates along."""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping
from dataclasses import dataclass

TOKENS = "tokens"
ENCODER, DECODER = "encoder", "decoder"


@dataclass(frozen=True)
class TokenAttention:
    """One attention: the tokens of `queries` attend to those of `sources` (the same set in self-attention).

    Attributes:
        pattern: HookPoint of its pattern [batch, head, query, source].
        before: HookPoint of the stream that its output is added to.
        written: HookPoint of its output [batch, query, d_model].
        queries: the token set that attends.
        sources: the token set that is attended to.
        together: attentions that follow each other and have the same label here read the same state (co-attention of two sets).
    """

    pattern: str
    before: str
    written: str
    queries: str = TOKENS
    sources: str = TOKENS
    together: str = ""


def block_attentions(points: Container[str], aliases: Mapping[str, str], adding_inside: Container[str] = ()) -> list[TokenAttention]:
    """The attentions of a TransformerBridge by the names of its HookPoints: blocks, or encoder blocks and then decoder blocks.

    adding_inside: blocks whose attention component gives the sum with the stream, normalised; what it adds is its output projection's.
    """
    found = []
    for tokens, stack, own in ((TOKENS, "blocks", "attn"), (ENCODER, "encoder_blocks", "attn"), (DECODER, "decoder_blocks", "self_attn")):
        for layer in itertools.count():
            block = f"{stack}.{layer}"
            if f"{block}.hook_in" not in points:
                break
            written = aliases.get(f"{block}.hook_attn_out", f"{block}.{own}.hook_out")
            written = f"{block}.{own}.o.hook_out" if block in adding_inside else written
            found.append(TokenAttention(f"{block}.{own}.hook_pattern", f"{block}.hook_in", written, tokens, tokens))
            if tokens == DECODER:
                cross = f"{block}.cross_attn"
                # pre-norm (T5) has a HookPoint on the stream; post-norm (BART) gives it to the attention as it is
                middle = f"{block}.hook_resid_mid"
                before = middle if middle in points else f"{cross}.hook_in"
                found.append(TokenAttention(f"{cross}.hook_pattern", before, f"{cross}.hook_out", DECODER, ENCODER))
    return found
