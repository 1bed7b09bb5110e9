"""Logits at the end of many prompts that begin alike: every beginning that some of them share is run once.

Prompts from which tokens are removed one after the other differ in few ways at first: of the n + 1 prompts of one order only p + 1 have
different first p tokens, so that half of the work is saved for one order, and more for several. A causal model computes the same for equal
beginnings. Tokens are run position by position with the model's own cache of keys and values, which is rearranged so that each beginning
goes on from the one that it extends; several positions at once where they are few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lens_relevance.hooked_model import root
from lens_relevance.logit_reading import can_read_some

_ENTRY = "unembed.hook_in"
CALL = 32  # a call of the model costs about as much again as so many tokens: its weights have to be read


def can_share(model: TransformerBridge) -> bool:
    """Whether a model generates text with keys and values of all its layers in a cache that can be rearranged.

    Not recurrent models, encoders, encoder-decoders, and those that Hugging Face does not run.
    """
    config = getattr(root(model), "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False) or not hasattr(root(model), "prepare_inputs_for_generation"):
        return False
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        return False
    layers = DynamicCache(config=config.get_text_config()).layers
    return can_read_some(model) and len(layers) > 0 and all(isinstance(layer, DynamicLayer) for layer in layers)


@torch.no_grad()
def end_logits(
    model: TransformerBridge,
    ids: Int[Tensor, "row pos"],
    lengths: Int[Tensor, " row"],
    *,
    filled: Bool[Tensor, "row pos"],
    filler: Float[Tensor, " d_model"] | None,
    embedding: str,
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "n 1 d_vocab"]]]:
    """Rows that end in the same call of the model, with their logits there, until all rows have ended.

    Args:
        model: A causal language model; see `can_share`.
        ids: Token ids, from the first on; what is beyond a row's length is not read.
        lengths: Tokens of each row, at least one.
        filled: Where the embedding is the filler instead of that of the id.
        filler: In place of embeddings.
        embedding: The HookPoint of the token embeddings.
    """
    beyond = torch.arange(ids.shape[1]) >= lengths.cpu().unsqueeze(1)
    symbols = torch.where(filled, -1, ids).cpu().masked_fill(beyond, -2)
    lengths = lengths.cpu()
    config: Any = root(model).config
    cache = DynamicCache(config=config.get_text_config())
    beginning = torch.zeros(len(symbols), dtype=torch.long)  # of each row, among those up to the position before
    start = 0
    for stop in _stops(symbols, lengths):
        rows = (lengths > start).nonzero().flatten()
        known = torch.cat([beginning[rows].unsqueeze(1), symbols[rows, start:stop]], 1)
        distinct, beginning[rows] = known.unique(dim=0, return_inverse=True)
        if start:
            cache.batch_select_indices(distinct[:, 0].to(ids.device))
        symbol = distinct[:, 1:].to(ids.device)
        ending = rows[lengths[rows] <= stop]
        read = (beginning[ending], lengths[ending] - 1 - start) if len(ending) else (torch.zeros(1, dtype=torch.long),) * 2

        def fill(x: Tensor, hook: Any, gone: Tensor = symbol == -1) -> Tensor:
            return x if filler is None else torch.where(gone.unsqueeze(-1), filler.to(x), x)

        def take(x: Tensor, hook: Any, read: tuple[Tensor, Tensor] = read) -> Tensor:
            return x[read[0].to(x.device), read[1].to(x.device)].unsqueeze(1)

        with model.hooks(fwd_hooks=[(embedding, fill), (_ENTRY, take)]):
            logits = model(symbol.clamp(min=0), return_type="logits", past_key_values=cache, use_cache=True)
        if len(ending):
            yield ending, logits
        start = stop


def _stops(symbols: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"]) -> list[int]:
    """Where each call of the model ends: as many positions at once as cost less, run for every row anew, than calls of their own would."""
    longest = int(lengths.max())
    distinct = [len(symbols[lengths > i, : i + 1].unique(dim=0)) for i in range(longest)]  # beginnings that go up to each position
    stops, start = [], 0
    for stop in range(1, longest + 1):
        if stop == longest or _at_once(symbols, lengths, start, stop + 1) - sum(distinct[start : stop + 1]) > CALL * (stop - start):
            stops.append(stop)
            start = stop
    return stops


def _at_once(symbols: Int[Tensor, "row pos"], lengths: Int[Tensor, " row"], start: int, stop: int) -> int:
    """Tokens of one call for these positions."""
    return len(symbols[lengths > start, :stop].unique(dim=0)) * (stop - start)
