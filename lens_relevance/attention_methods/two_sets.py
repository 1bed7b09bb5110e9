"""Accumulation over two token sets by the update rules of Chefer et al. 2021b and of weighted accumulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_relevance.attention_methods.accumulation import Accumulation
from lens_relevance.attention_methods.update_rules import Relevancies, Weights, co_attention, cross_attention, self_attention
from lens_relevance.errors import RelevanceError
from lens_relevance.sites import TokenAttention


@dataclass(frozen=True)
class TwoSets(Accumulation):
    """R_ss, R_qq, R_sq and R_qs, laid side by side as one matrix over the tokens of both sets (s, then q).

    maps: of each attention the positive relevance of its heads over the number of heads, in its own block. weights: alpha and beta of its
    querying tokens, None for Chefer's. start: the explained row over all tokens. masks: of s and of q.
    """

    attentions: Sequence[TokenAttention]
    maps: Sequence[Float[Tensor, "batch head _ _"]]
    weights: Sequence[tuple[Tensor, Tensor] | None]
    start: Float[Tensor, "batch token"]
    masks: tuple[Bool[Tensor, "batch s"], Bool[Tensor, "batch q"]]
    s: str

    def scores(self) -> Float[Tensor, "batch source"]:
        return self._scores(self.maps)

    def matrix(self) -> Float[Tensor, "batch token source"]:
        return _joint(self._relevancies(self.maps))

    def layers(self) -> Float[Tensor, "batch layer token source"]:
        """diag(beta) I + diag(alpha) A-bar of each attention alone: what it does before anything else is accumulated."""
        real, matrices = torch.cat(self.masks, 1).to(self.start.dtype), []
        n = self.masks[0].shape[1]
        for one, maps, weights in zip(self.attentions, self.maps, self.weights, strict=True):
            rows, columns = (slice(0, n) if name == self.s else slice(n, None) for name in (one.queries, one.sources))
            alpha, beta = weights if weights is not None else (torch.ones_like(real[:, rows]),) * 2
            kept = real.clone()
            kept[:, rows] = kept[:, rows] * beta
            matrix = torch.diag_embed(kept)
            matrix[:, rows, columns] += alpha.unsqueeze(-1) * maps.sum(1)
            matrices.append(matrix)
        return torch.stack(matrices, 1)

    def heads(self) -> Float[Tensor, "batch layer head"]:
        """A_h * d(sum of the scores) / dA_h, with the row sums of N as they are: for one token set, the unrolled explained row.

        The scores are linear in the maps of any one attention, so the parts of its heads add up to what the scores owe that attention.
        """
        with torch.enable_grad():
            maps = [one.detach().requires_grad_(True) for one in self.maps]
            gradients = torch.autograd.grad(self._scores(maps).sum(), maps, allow_unused=True, materialize_grads=True)
        parts = [(one.detach() * gradient).sum((2, 3)) for one, gradient in zip(maps, gradients, strict=True)]
        if len({part.shape[1] for part in parts}) > 1:
            raise RelevanceError("the attentions of this model differ in their number of heads, so there is no table layer by head")
        return torch.stack(parts, 1)

    def _scores(self, maps: Sequence[Tensor]) -> Float[Tensor, "batch source"]:
        return torch.einsum("bt,bts->bs", self.start, _joint(self._relevancies(maps)))

    def _relevancies(self, maps: Sequence[Tensor]) -> Relevancies:
        r = Relevancies.start(*(mask.to(self.start.dtype) for mask in self.masks))
        steps = zip(self.attentions, (one.sum(1) for one in maps), self.weights, strict=True)
        for _, together in groupby(enumerate(steps), lambda step: step[1][0].together or step[0]):
            r = self._update(r, [step for _, step in together])
        return r

    def _update(self, r: Relevancies, steps: list[tuple[TokenAttention, Tensor, Weights | None]]) -> Relevancies:
        (one, attention, weights), swapped = steps[0], steps[0][0].queries != self.s
        r = r.swapped() if swapped else r
        if len(steps) == 2:
            (other, back, its_weights) = steps[1]
            r = co_attention(r, attention, back, weights_s=weights, weights_q=its_weights)
        else:
            r = (self_attention if one.queries == one.sources else cross_attention)(r, attention, weights)
        return r.swapped() if swapped else r


def check_groups(attentions: Sequence[TokenAttention]) -> None:
    """Refuse attentions declared as computed together that are not each other's counterpart."""
    for label, together in groupby(attentions, lambda one: one.together):
        group = [(one.queries, one.sources) for one in together]
        if label and (len(group) != 2 or group[0] != group[1][::-1] or group[0][0] == group[0][1]):
            raise RelevanceError(
                f"attentions together={label!r} are {group}; co-attention is two attentions in a row, one from each token set to the other"
            )


def _joint(r: Relevancies) -> Float[Tensor, "batch token source"]:
    return torch.cat([torch.cat([r.ss, r.sq], 2), torch.cat([r.qs, r.qq], 2)], 1)
