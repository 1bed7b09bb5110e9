"""Activations of a model on many tokens, streamed: what passes the HookPoints that a dictionary reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import RelevanceError
from lens_relevance.logit_reading import without_logits
from lens_relevance.sites import anatomy

_TOKENS_PER_PASS = 2048


def token_rows(model: TransformerBridge, text: str, context: int) -> Int[Tensor, "row context"]:
    """A text as rows of equally many tokens, each beginning as the model's prompts do; what is left at the end is dropped."""
    tokenizer: Any = model.tokenizer
    start = tokenizer.bos_token_id
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    width = context - (start is not None)
    if len(ids) < width:
        raise RelevanceError(f"the text has {len(ids)} tokens, which fill no row of {context}; give a longer text or a smaller context")
    rows = ids[: len(ids) // width * width].reshape(-1, width)
    return rows if start is None else torch.cat([torch.full((len(rows), 1), start), rows], 1)


@torch.no_grad()
def activations(
    model: TransformerBridge, rows: Int[Tensor, "row pos"], point_in: str, *, point_out: str
) -> Iterator[tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]]:
    """What is read and what is to be written, some rows at a time. First tokens are left out: models use them as a place to rest."""
    found: dict[str, Tensor] = {}
    names = anatomy(model).canonical(point_in), anatomy(model).canonical(point_out)

    def keep(name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            found[name] = x.detach()

        return hook

    for given in rows.split(max(1, _TOKENS_PER_PASS // rows.shape[1])):
        given = given.to(model.cfg.device)
        with model.hooks(fwd_hooks=[(name, keep(name)) for name in dict.fromkeys(names)]), without_logits(model, given):
            model(given, return_type=None)
        yield tuple(found[name].float().flatten(2)[:, 1:].flatten(0, 1) for name in names)  # type: ignore[misc]
