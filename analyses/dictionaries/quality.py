"""How good a dictionary is: what it misses, how many of its features are ever on, and what the model loses with it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.dictionaries.activations import activations
from analyses.patching.patcher import LOGITS_AT_ONCE
from lens_relevance import Dictionary
from lens_relevance.sites import anatomy


@dataclass(frozen=True)
class Quality:
    """Of a dictionary, on tokens [n].

    Attributes:
        variance_unexplained: Squared error, as a share of the variance of what is to be written.
        dead_share: Share of features that are on at no token.
        active: Features that are on at a token, on average.
        loss_recovered: 1 where the model's loss is the same with the reconstruction in place, 0 where it is as with the mean in place.
        n_tokens: Tokens that this was measured on.
    """

    variance_unexplained: float
    dead_share: float
    active: float
    loss_recovered: float
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"variance unexplained {self.variance_unexplained:.3f}, dead features {self.dead_share:.1%}, {self.active:.1f} on at a "
            f"token, loss recovered {self.loss_recovered:.3f} (on {self.n_tokens} tokens)"
        )


@torch.no_grad()
def measure_quality(model: TransformerBridge, dictionary: Dictionary, rows: Int[Tensor, "row pos"]) -> Quality:
    """The quality of a dictionary on these rows of tokens."""
    pairs = list(activations(model, rows, dictionary.point_in, point_out=dictionary.point_out[0]))
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    here = dictionary.to(x)
    values = here.encode(x)
    missed = (y - here.decode(values, x)).square().sum()
    mean = y.mean(0)
    losses = [_loss(model, dictionary, rows, put) for put in ("own", "mean", "reconstruction")]
    return Quality(
        variance_unexplained=float(missed / (y - mean).square().sum()),
        dead_share=float((values != 0).any(0).logical_not().double().mean()),
        active=float((values != 0).sum(1).double().mean()),
        loss_recovered=(losses[1] - losses[2]) / (losses[1] - losses[0]),
        n_tokens=len(x),
    )


def _loss(model: TransformerBridge, dictionary: Dictionary, rows: Tensor, put: str) -> float:
    """The mean loss of the next token, with what the dictionary writes put in place; first positions are left as they are."""
    names = [anatomy(model).canonical(name) for name in (dictionary.point_in, dictionary.point_out[0])]
    read: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> None:
        read.append(x)

    def replace(y: Tensor, hook: Any) -> Tensor:
        x = read.pop()
        if put == "own":
            return y
        flat, here = x.float().flatten(2), dictionary.to(x.float())
        new = (
            here.decode(here.encode(flat), flat)
            if put == "reconstruction"
            else y.float().flatten(2)[:, 1:].mean((0, 1)).expand(flat.shape[0], flat.shape[1], -1)
        )
        new = new.reshape(y.shape).to(y)
        return torch.cat([y[:, :1], new[:, 1:]], 1)

    total, count = 0.0, 0
    for given in rows.split(max(1, LOGITS_AT_ONCE // (rows.shape[1] * model.cfg.d_vocab))):
        given = given.to(model.cfg.device)
        with model.hooks(fwd_hooks=[(names[0], keep), (names[1], replace)]):
            logits = model(given)
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), given[:, 1:].flatten(), reduction="sum")
        total, count = total + float(losses), count + given[:, 1:].numel()
    return total / count
