"""One run of the model as the attention methods see it: patterns, their gradients, and the row that is explained.

Two token sets (encoder and decoder, image and question) are laid side by side as one: a cross-attention is a block of its pattern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.prompt import read_mask
from lens_relevance.rules.base import share, working
from lens_relevance.sites import Anatomy, TokenAttention


@dataclass(frozen=True)
class AttentionRun:
    """What one forward and backward left at every attention; padding is 0 in everything it gives.

    A `layer` is one attention in the order of computation. importance: how weighted accumulation weighs tokens. plain: a second run under
    the plain gradient, where a method needs both. masks: True where a token is real, by token set.
    """

    body: Anatomy
    cache: RelevanceCache
    importance: str
    plain: RelevanceCache
    masks: Mapping[str, Bool[Tensor, "batch _"]]

    @property
    def attentions(self) -> list[TokenAttention]:
        return self.body.attentions

    @property
    def n_layers(self) -> int:
        return len(self.attentions)

    @property
    def mask(self) -> Bool[Tensor, "batch token"]:
        """True where a token is real, the sets one after the other."""
        return torch.cat(list(self.masks.values()), 1)

    @property
    def explained_set(self) -> str:
        """The set that the target reads: that of the last attention."""
        return self.attentions[-1].queries

    def span(self, tokens: str) -> slice:
        """Where a token set lies among all tokens."""
        before = 0
        for name, mask in self.masks.items():
            if name == tokens:
                return slice(before, before + mask.shape[1])
            before += mask.shape[1]
        raise RelevanceError(f"there is no token set {tokens!r}; this model has {', '.join(self.masks)}")

    @property
    def start(self) -> Float[Tensor, "batch token"]:
        """1 at the token whose row is explained: the position that the target reads (equal parts where it reads several)."""
        last = self.attentions[-1]
        read = self._rows((self.cache.coefficients[self.body.canonical(last.written)] != 0).any(-1), last.queries) & self.mask
        if not bool(read.any(1).all()):
            rows = (~read.any(1)).nonzero().flatten().tolist()
            raise RelevanceError(f"the target reads no position of example(s) {rows}: its gradient at the last attention is 0 everywhere")
        return working(read.to(self.cache.value.dtype)) / read.sum(1, keepdim=True)

    def pattern(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """The attention pattern, 0 where the query or the key is padding."""
        real = self.mask[:, None, :, None] & self.mask[:, None, None, :]
        pattern = self._block(self.cache.activations, layer)
        return torch.where(real, pattern, torch.zeros_like(pattern))

    def gradient(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """dA: the gradient of the target at the pattern (under another ruleset, the coefficient it delivers)."""
        return self._block(self.cache.coefficients, layer)

    def relevance(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """A * dA: the relevance of each entry of the pattern."""
        return share(self.pattern(layer), self.gradient(layer))

    def plain_gradient(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """The plain gradient at the pattern, whatever the ruleset."""
        return self._block(self.plain.coefficients, layer)

    def activation(self, name: str, tokens: str | None = None) -> Float[Tensor, "batch token *features"]:
        """The activation at a HookPoint of a token set (the only one by default), 0 at padding and in other sets."""
        activation = self._rows(working(self.cache.activations[self.body.canonical(name)]), tokens)
        real = self.mask.reshape(*self.mask.shape, *[1] * (activation.ndim - 2))
        return torch.where(real, activation, torch.zeros_like(activation))

    def coefficient(self, name: str, tokens: str | None = None) -> Float[Tensor, "batch token *features"]:
        """The coefficient at a HookPoint of a token set (the only one by default)."""
        return self._rows(working(self.cache.coefficients[self.body.canonical(name)]), tokens)

    def _rows(self, tensor: Tensor, tokens: str | None) -> Tensor:
        """[batch, token of the set, ...] with rows of zeros for the tokens of the other set."""
        if len(self.masks) == 1 or tokens is None:
            return tensor
        result = tensor.new_zeros(*self.mask.shape, *tensor.shape[2:])
        result[:, self.span(tokens)] = tensor
        return result

    def _block(self, kept: Mapping[str, Tensor], layer: int) -> Tensor:
        """A pattern among those of all tokens."""
        one = self.attentions[layer]
        block = working(kept[self.body.canonical(one.pattern)])
        if len(self.masks) == 1:
            return block
        n = self.mask.shape[1]
        result = block.new_zeros(*block.shape[:2], n, n)
        result[:, :, self.span(one.queries), self.span(one.sources)] = block
        return result


def run_points(body: Anatomy) -> list[str]:
    """Names that every method needs: each pattern, and what the last attention wrote, where the target reads."""
    return [*(one.pattern for one in body.attentions), body.attentions[-1].written]


def token_sets(body: Anatomy) -> list[str]:
    """Names of a model's token sets, in the order in which attention meets them."""
    return list(dict.fromkeys(name for one in body.attentions for name in (one.queries, one.sources)))


def read_masks(body: Anatomy, cache: RelevanceCache, given: Mapping[str, Tensor]) -> dict[str, Bool[Tensor, "batch _"]]:
    """True where a token is real, by token set; `given` holds masks of some sets, all tokens of the others are real.

    Raises RelevanceError for a mask of another shape, or of a set that is not there.
    """
    sizes = {}
    for one in body.attentions:
        pattern = cache.activations[body.canonical(one.pattern)]
        sizes[one.queries], sizes[one.sources] = pattern.shape[-2], pattern.shape[-1]
    names, masks = token_sets(body), {}
    for name in given:
        if name not in names:
            raise RelevanceError(f"attention_mask names the token set {name!r}; this model has {', '.join(names)}")
    for name in names:
        shape = (len(cache.value), sizes[name])
        mask = given.get(name, cache.value.new_ones(shape))
        if tuple(mask.shape) != shape:
            raise RelevanceError(f"the mask of {name!r} has shape {tuple(mask.shape)}, its tokens {shape}; give one entry per token")
        masks[name] = read_mask(mask, f"the mask of {name!r}").to(cache.value.device).bool()
    return masks


def check_patterns(body: Anatomy, model: HookedModel) -> None:
    """Refuse a model whose patterns do not exist or are decorative: nothing here could be computed from them."""
    names = [one.pattern for one in body.attentions]
    dead = [name for name in names if name not in body.aliases or body.canonical(name) in body.decorative]
    if dead or not names:
        family = getattr(getattr(model, "cfg", None), "architecture", None) or type(getattr(model, "original_model", model)).__name__
        remedy = "" if hasattr(model, "original_model") else "; name its attentions in declare_sites(attentions=[TokenAttention(...)])"
        raise CoverageError(
            f"{family} has no live attention pattern ({', '.join(dead[:3]) or 'no attention is known'}{', ...' if len(dead) > 3 else ''}), "
            f"so token relevance from attention cannot be had{remedy or '; use propagate(...).tokens(), which does not need patterns'}"
        )
    if len(token_sets(body)) > 2:
        raise RelevanceError(f"token relevance knows one or two token sets; this model has {', '.join(token_sets(body))}")
