"""One run of the model as the attention methods see it: patterns, their gradients, and the row that is explained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.rules.base import share, working
from lens_relevance.sites import Anatomy


@dataclass(frozen=True)
class AttentionRun:
    """What one forward and backward left at the attention of every layer; padding is 0 in everything it gives.

    importance: how weighted accumulation weighs tokens. plain: a second run under the plain gradient, where a method needs both.
    """

    body: Anatomy
    cache: RelevanceCache
    importance: str
    plain: RelevanceCache

    @property
    def n_layers(self) -> int:
        return self.body.n_layers

    @property
    def mask(self) -> Bool[Tensor, "batch token"]:
        """True where a token is real."""
        return self.cache.mask.bool()

    @property
    def start(self) -> Float[Tensor, "batch token"]:
        """1 at the token whose row is explained: the position that the target reads (equal parts where it reads several)."""
        read = (self.cache.coefficients[f"blocks.{self.n_layers - 1}.hook_out"] != 0).any(-1) & self.mask
        if not bool(read.any(1).all()):
            rows = (~read.any(1)).nonzero().flatten().tolist()
            raise RelevanceError(f"the target reads no position of example(s) {rows}: its gradient at the last residual is 0 everywhere")
        return working(read.to(self.cache.value.dtype)) / read.sum(1, keepdim=True)

    def pattern(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """The attention pattern, 0 where the query or the key is padding."""
        real = self.mask[:, None, :, None] & self.mask[:, None, None, :]
        pattern = working(self.cache.activations[self._name(layer)])
        return torch.where(real, pattern, torch.zeros_like(pattern))

    def gradient(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """dA: the gradient of the target at the pattern (under another ruleset, the coefficient it delivers)."""
        return working(self.cache.coefficients[self._name(layer)])

    def relevance(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """A * dA: the relevance of each entry of the pattern."""
        return share(self.pattern(layer), self.gradient(layer))

    def plain_gradient(self, layer: int) -> Float[Tensor, "batch head token source"]:
        """The plain gradient at the pattern, whatever the ruleset."""
        return working(self.plain.coefficients[self._name(layer)])

    def activation(self, layer: int, point: str) -> Float[Tensor, "batch token *features"]:
        """The activation at `blocks.{layer}.{point}`, 0 at padding."""
        activation = working(self.cache.activations[self.body.canonical(f"blocks.{layer}.{point}")])
        real = self.mask.reshape(*self.mask.shape, *[1] * (activation.ndim - 2))
        return torch.where(real, activation, torch.zeros_like(activation))

    def coefficient(self, layer: int, point: str) -> Float[Tensor, "batch token *features"]:
        """The coefficient at `blocks.{layer}.{point}`."""
        return working(self.cache.coefficients[self.body.canonical(f"blocks.{layer}.{point}")])

    def _name(self, layer: int) -> str:
        return f"blocks.{layer}.attn.hook_pattern"


def run_points(body: Anatomy) -> list[str]:
    """Names that every method needs: each layer's pattern, and the last residual, where the target reads."""
    return [*(f"blocks.{layer}.attn.hook_pattern" for layer in range(body.n_layers)), f"blocks.{body.n_layers - 1}.hook_out"]


def check_patterns(body: Anatomy, model: Any) -> None:
    """Refuse a model whose patterns do not exist or are decorative: nothing here could be computed from them."""
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(body.n_layers)]
    dead = [name for name in names if name not in body.points or name in body.decorative]
    if dead or not names:
        family = getattr(model.cfg, "architecture", None) or type(model.original_model).__name__
        raise CoverageError(
            f"{family} has no live attention pattern ({', '.join(dead[:3]) or 'no blocks'}{', ...' if len(dead) > 3 else ''}), so token "
            "relevance from attention cannot be had; use propagate(...).tokens(), which does not need patterns"
        )
