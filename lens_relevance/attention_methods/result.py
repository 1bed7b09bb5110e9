"""TokenRelevance, and TokenSetsRelevance for two token sets: what token_relevance gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import Any, NoReturn

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance.attention_methods.accumulation import Accumulation
from lens_relevance.errors import RelevanceError
from lens_relevance.notebook_form import examples_html


@dataclass(frozen=True)
class TokenRelevance:
    """Relevance of tokens for tokens. Scales differ from method to method and grow with depth: compare within a row.

    scores, matrix, layers and heads are computed when they are first read. explained: the weight of each token's row in `scores` (1 at the
    position the target reads). value: the target [batch]. mask: True where a token is real; all relevance of padding is exactly 0.
    """

    method: str
    importance: str
    rules: str
    value: Float[Tensor, " batch"]
    explained: Float[Tensor, "batch token"]
    input_tokens: Int[Tensor, "batch token"]
    mask: Bool[Tensor, "batch token"]
    accumulation: Accumulation
    tokenizer: Any = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """One line: how it was computed, and for how much."""
        return f"TokenRelevance({self.method}, rules {self.rules}, {len(self.value)} example(s) of {self.mask.shape[1]} tokens)"

    def _repr_html_(self) -> str:
        return f"<div><code>{escape(repr(self))}</code></div>" + examples_html(self.tokenizer, self.input_tokens, self.mask, self.scores)

    @cached_property
    def scores(self) -> Float[Tensor, "batch source"]:
        """Relevance of each token for the explained one."""
        return self.accumulation.scores()

    @cached_property
    def matrix(self) -> Float[Tensor, "batch token source"]:
        """Relevance of every source for every token."""
        return self.accumulation.matrix()

    @cached_property
    def layers(self) -> Float[Tensor, "batch layer token source"]:
        """Each layer's own matrix."""
        return self.accumulation.layers()

    @cached_property
    def heads(self) -> Float[Tensor, "batch layer head"]:
        """What each head passes on to `scores`: the explained row is unrolled downward through the layers above, the head's own part of
        its layer carries it on, and the layers below take it to the inputs.

        These are single-run scores, mostly without a sign: how much of the row went through a head. `propagate(..., rules="deeplift",
        reference=...)` says instead how much of the *difference* between two prompts' targets a head carries, signed and adding up.
        """
        return self.accumulation.heads()

    @property
    def across(self) -> NoReturn:
        """Relevance of one token set for another (encoder-decoders, two streams)."""
        raise RelevanceError(
            "this model has one set of tokens and no cross-attention, so there is nothing across; scores and matrix hold all there is"
        )

    def to_frame(self) -> pd.DataFrame:
        """Long table with columns example, position, token, score; real tokens only."""
        example, position = (index.cpu().numpy() for index in self.mask.nonzero(as_tuple=True))
        return pd.DataFrame(
            {
                "example": example,
                "position": position,
                "token": self.input_tokens[self.mask].cpu().numpy(),
                "score": self.scores[self.mask].double().cpu().numpy(),
            }
        )


@dataclass(frozen=True)
class TokenSetsRelevance:
    """Relevance of tokens for tokens in a model with two token sets: encoder and decoder, image and question.

        found = token_relevance(t5, "translate English to German: the house", logit("Haus"))
        found.scores["encoder"], found.across["decoder", "encoder"]

    As TokenRelevance, but by token set. explained: the weight of each token's row in `scores`; it lies in the set that the target reads.
    masks: True where a token is real. attentions: names of the patterns, in the order of computation.
    """

    method: str
    importance: str
    rules: str
    value: Float[Tensor, " batch"]
    explained: Mapping[str, Float[Tensor, "batch _token"]]
    masks: Mapping[str, Bool[Tensor, "batch _token"]]
    attentions: tuple[str, ...]
    accumulation: Accumulation

    def __repr__(self) -> str:
        """One line: how it was computed, and for how much."""
        sets = ", ".join(f"{name} of {mask.shape[1]} tokens" for name, mask in self.masks.items())
        return f"TokenSetsRelevance({self.method}, rules {self.rules}, {len(self.value)} example(s): {sets})"

    @cached_property
    def scores(self) -> dict[str, Float[Tensor, "batch _token"]]:
        """Relevance of each token of each set for the explained one."""
        return self._split(self.accumulation.scores(), 1)

    @cached_property
    def matrix(self) -> dict[str, Float[Tensor, "batch _token _source"]]:
        """Relevance of a set's tokens for each other: R_ss and R_qq."""
        return {name: self._all[name, name] for name in self.masks}

    @cached_property
    def across(self) -> dict[tuple[str, str], Float[Tensor, "batch _token _source"]]:
        """Relevance of one set's tokens for the other's, by (explained set, source set): R_sq and R_qs."""
        return {names: block for names, block in self._all.items() if names[0] != names[1]}

    @cached_property
    def layers(self) -> Float[Tensor, "batch attention token source"]:
        """Each attention's own matrix over the tokens of both sets, one set after the other in the order of `masks`."""
        return self.accumulation.layers()

    @cached_property
    def heads(self) -> Float[Tensor, "batch attention head"]:
        """What each head passes on to `scores`, summed over both sets; see TokenRelevance.heads."""
        return self.accumulation.heads()

    def to_frame(self) -> pd.DataFrame:
        """Long table with columns example, set, position, score; real tokens only."""
        frames = []
        for name, mask in self.masks.items():
            example, position = (index.cpu().numpy() for index in mask.nonzero(as_tuple=True))
            score = self.scores[name][mask].double().cpu().numpy()
            frames.append(pd.DataFrame({"example": example, "set": name, "position": position, "score": score}))
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def _all(self) -> dict[tuple[str, str], Tensor]:
        rows = self._split(self.accumulation.matrix(), 1)
        return {(name, source): block for name, part in rows.items() for source, block in self._split(part, 2).items()}

    def _split(self, joint: Tensor, dim: int) -> dict[str, Tensor]:
        """What lies side by side, by token set."""
        return dict(zip(self.masks, joint.split([mask.shape[1] for mask in self.masks.values()], dim), strict=True))
