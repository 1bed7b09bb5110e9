"""Attributions of prompts' tokens by name, all with one signature: (model, tokens, target, mask) -> [batch, pos]."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.methods import Estimator, TokenScores, by_ruleset, estimator
from analyses.perturbation.removal_runs import one_by_one
from analyses.perturbation.text import TextRemoval
from lens_relevance import RelevanceError, Target
from lens_relevance.ruleset_tables import Table

Attribution = Callable[[Any, Int[Tensor, "batch pos"], Target, Int[Tensor, "batch pos"]], Float[Tensor, "batch pos"]]


def attribution(method: str | Estimator | Attribution) -> Attribution:
    """An attribution of tokens: a method of `analyses.methods` (by name or as an Estimator), `occlusion` or `random`, or a callable.

    Raises:
        RelevanceError: an unknown method, or one that scores no tokens of single prompts.
    """
    if method == "occlusion":
        return occlusion()
    if method == "random":
        return random_order()
    if not isinstance(method, str | Estimator):
        return method
    scores = token_scores(method)
    return lambda model, tokens, target, mask: scores(model, tokens, target, attention_mask=mask)


def passes(method: str | Estimator, n_tokens: int) -> tuple[int, int]:
    """Forward and backward passes that the scores of a prompt of so many tokens take.

    Raises:
        RelevanceError: an unknown method, or one that scores no tokens of single prompts.
    """
    if method == "random":
        return 0, 0
    return (n_tokens + 1, 0) if method == "occlusion" else estimator(method).token_passes(n_tokens)


def token_scores(method: str | Estimator) -> TokenScores:
    """How a method scores the tokens of single prompts.

    Raises:
        RelevanceError: an unknown method, or one that scores no tokens of single prompts.
    """
    chosen = estimator(method)
    if chosen.tokens is None:
        raise RelevanceError(
            f"{chosen.name} compares the two runs of a pair and scores no tokens of single prompts; choose a ruleset, a method of token "
            "relevance, 'occlusion' or 'random'"
        )
    return chosen.tokens


def against(*references: Any, rules: str | Table = "deeplift") -> Attribution:
    """Relevance at the token embeddings under a pair ruleset, against one reference or averaged over several.

    Source: ours; the pair rules have sources of their own.

    Args:
        references: what `propagate` takes: `mean_embedding()`, `random_tokens(8)`, token ids, ...

    Raises:
        RelevanceError: there are no references.
    """
    if not references:
        raise RelevanceError("against() needs at least one reference, such as mean_embedding() or random_tokens(8)")
    tokens_under = token_scores(by_ruleset(rules))

    def scores(model: TransformerBridge, tokens: Tensor, target: Target, mask: Tensor) -> Tensor:
        return torch.stack([tokens_under(model, tokens, target, attention_mask=mask, reference=one) for one in references]).mean(0)

    return scores


def occlusion(baseline: str = "mean_embedding", seed: int = 0) -> Attribution:
    """Fall of the target when one token alone is removed: one forward per token.

    Source: Zeiler and Fergus 2014 (arXiv 1311.2901), for tokens.
    """

    def scores(model: TransformerBridge, tokens: Tensor, target: Target, mask: Tensor) -> Float[Tensor, "batch pos"]:
        return one_by_one(TextRemoval(model, tokens, mask, target=target, baseline=baseline, seed=seed), mask.bool())

    return scores


def random_order(seed: int = 0) -> Attribution:
    """Scores without meaning: what every method must beat. Each prompt has an order of its own, whatever batch it comes in.

    Source: ours.
    """

    def scores(model: TransformerBridge, tokens: Tensor, target: Target, mask: Tensor) -> Tensor:
        rows = []
        for row in tokens.cpu():
            own = zlib.crc32(row.numpy().tobytes(), seed)
            rows.append(torch.rand(len(row), generator=torch.Generator().manual_seed(own), dtype=torch.float64))
        return torch.stack(rows)

    return scores
