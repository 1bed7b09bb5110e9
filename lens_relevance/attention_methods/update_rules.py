"""Update rules for two sets of tokens s and q (text and image, decoder and encoder), as pure tensor functions.

Chefer et al. 2021b (arXiv 2103.15679) with the weights of weighted accumulation (our reading of Huang et al. 2023, derived here); without
weights they are Chefer's. A-bar are positive relevance maps (dA * A)^+ averaged over heads.

| attention | update |
|---|---|
| self in s | R_ss <- beta R_ss + alpha A-bar R_ss,  R_sq <- beta R_sq + alpha A-bar R_sq |
| cross, s asks q | R_sq <- beta R_sq + alpha N(R_ss)^T A-bar N(R_qq),  R_ss <- beta R_ss + alpha A-bar R_qs |

alpha and beta weigh rows (tokens of s), alpha + beta = 2. N(R) = (R - P) / row sum + I, where P is what is left in R of the identity it
started as: P <- beta P with every update of R_ss. A row in which nothing but P is left gives I.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Relevancies:
    """Relevance of tokens for tokens within two sets and across: rows are explained, columns explain.

    identity_s, identity_q: the diagonals of P.
    """

    ss: Float[Tensor, "batch s s"]
    qq: Float[Tensor, "batch q q"]
    sq: Float[Tensor, "batch s q"]
    qs: Float[Tensor, "batch q s"]
    identity_s: Float[Tensor, "batch s"]
    identity_q: Float[Tensor, "batch q"]

    @classmethod
    def start(cls, mask_s: Float[Tensor, "batch s"], mask_q: Float[Tensor, "batch q"]) -> Relevancies:
        """R_ss = R_qq = I (0 where a mask is 0), nothing across."""
        across = mask_s.new_zeros(*mask_s.shape, mask_q.shape[1])
        return cls(torch.diag_embed(mask_s), torch.diag_embed(mask_q), across, across.mT, mask_s, mask_q)

    def swapped(self) -> Relevancies:
        """The same with the two sets exchanged, so that every rule need only be written for s."""
        return Relevancies(self.qq, self.ss, self.qs, self.sq, self.identity_q, self.identity_s)


Weights = tuple[Float[Tensor, "batch s"], Float[Tensor, "batch s"]]


def self_attention(r: Relevancies, attention: Float[Tensor, "batch s s"], weights: Weights | None = None) -> Relevancies:
    """Tokens of s have attended to each other. weights: (alpha, beta) per token of s; None is Chefer's."""
    alpha, beta = _rows(r, weights)
    return replace(
        r,
        ss=beta * r.ss + alpha * (attention @ r.ss),
        sq=beta * r.sq + alpha * (attention @ r.sq),
        identity_s=beta.squeeze(-1) * r.identity_s,
    )


def cross_attention(r: Relevancies, attention: Float[Tensor, "batch s q"], weights: Weights | None = None) -> Relevancies:
    """Tokens of s have attended to those of q (a decoder to its encoder)."""
    alpha, beta = _rows(r, weights)
    aligned = normalised(r.ss, r.identity_s).mT @ attention @ normalised(r.qq, r.identity_q)
    return replace(
        r,
        sq=beta * r.sq + alpha * aligned,
        ss=beta * r.ss + alpha * (attention @ r.qs),
        identity_s=beta.squeeze(-1) * r.identity_s,
    )


def co_attention(
    r: Relevancies,
    s_to_q: Float[Tensor, "batch s q"],
    q_to_s: Float[Tensor, "batch q s"],
    *,
    weights_s: Weights | None = None,
    weights_q: tuple[Float[Tensor, "batch q"], Float[Tensor, "batch q"]] | None = None,
) -> Relevancies:
    """Both sets have attended to each other in one layer: both updates start from the same state."""
    for_s = cross_attention(r, s_to_q, weights_s)
    for_q = cross_attention(r.swapped(), q_to_s, weights_q).swapped()
    return Relevancies(for_s.ss, for_q.qq, for_s.sq, for_q.qs, for_s.identity_s, for_q.identity_q)


def normalised(r: Float[Tensor, "batch n n"], identity: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n n"]:
    """N(R) = (R - P) / row sum + I, for P = diag(identity). Never negative where R and P are what the updates make them."""
    gathered = r - torch.diag_embed(identity)
    total = gathered.sum(-1, keepdim=True).detach()  # where heads are asked for their share, row sums are taken as they are
    share = torch.where(total == 0, torch.zeros_like(gathered), gathered / torch.where(total == 0, torch.ones_like(total), total))
    return share + torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)


def _rows(r: Relevancies, weights: Weights | None) -> tuple[Float[Tensor, "batch s 1"], Float[Tensor, "batch s 1"]]:
    alpha, beta = weights if weights is not None else (torch.ones_like(r.identity_s), torch.ones_like(r.identity_s))
    return alpha.unsqueeze(-1), beta.unsqueeze(-1)
