"""TokenRelevance: what token_relevance gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance.attention_methods.accumulation import Accumulation
from lens_relevance.errors import RelevanceError


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
            "this model has one set of tokens and no cross-attention, so there is nothing across; scores and matrix hold all there is "
            "(two sets: see lens_relevance.attention_methods.update_rules)"
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
