"""Attributions of prompts' tokens by name, all with one signature: (model, tokens, target, mask) -> [batch, pos]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.perturbation.removal_runs import one_by_one
from analyses.perturbation.text import TextRemoval
from lens_relevance import RelevanceError, Target, mean_embedding, propagate
from lens_relevance.attention_methods import METHODS, TokenRelevance, token_relevance
from lens_relevance.attention_methods.methods import ALIASES
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset, rulesets

Attribution = Callable[[Any, Tensor, Target, Tensor], Tensor]


def attribution(method: str | Attribution) -> Attribution:
    """An attribution by name; a callable is taken as it is.

    Names: rulesets (`attnlrp`, `relp`, ...; pair rules such as `deeplift` against `mean_embedding()`, see `against` for other references),
    methods of `token_relevance` (`chefer`, `rollout`, `weighted_accumulation`, ...), `occlusion` and `random`.
    """
    if not isinstance(method, str):
        return method
    if method in rulesets():
        return against(mean_embedding(), rules=method) if needs_reference(ruleset(method)) else by_ruleset(method)
    if method in METHODS or method in ALIASES:
        return by_attention(method)
    if method in ("occlusion", "random"):
        return occlusion() if method == "occlusion" else random_order()
    raise RelevanceError(
        f"unknown attribution {method!r}; choose one of {', '.join([*rulesets(), *METHODS, *ALIASES, 'occlusion', 'random'])}, or give a "
        "callable (model, tokens, target, mask) -> [batch, pos]"
    )


def by_ruleset(rules: str | Table) -> Attribution:
    """Relevance at the token embeddings under a ruleset for single runs."""
    return lambda model, tokens, target, mask: propagate(
        model, tokens, target, rules=rules, names_filter=["embed.hook_out"], attention_mask=mask
    ).tokens()


def against(*references: Any, rules: str | Table = "deeplift") -> Attribution:
    """Relevance at the token embeddings under a pair ruleset, against one reference or averaged over several.

    references: what `propagate` takes: `mean_embedding()`, `random_tokens(8)`, token ids, ...
    """
    if not references:
        raise RelevanceError("against() needs at least one reference, such as mean_embedding() or random_tokens(8)")

    def scores(model: Any, tokens: Tensor, target: Target, mask: Tensor) -> Tensor:
        runs = [
            propagate(model, tokens, target, rules=rules, names_filter=["embed.hook_out"], reference=one, attention_mask=mask).tokens()
            for one in references
        ]
        return torch.stack(runs).mean(0)

    return scores


def by_attention(method: str, importance: str = "relevance", rules: str | Table = "gradient") -> Attribution:
    """Scores of `token_relevance`."""

    def scores(model: Any, tokens: Tensor, target: Target, mask: Tensor) -> Float[Tensor, "batch pos"]:
        found = token_relevance(model, tokens, target, method=method, importance=importance, rules=rules, attention_mask=mask)
        if not isinstance(found, TokenRelevance):
            raise RelevanceError("this test removes the tokens of one set; for two, see analyses.perturbation.EmbeddingRemoval")
        return found.scores

    return scores


def occlusion(baseline: str = "mean_embedding", seed: int = 0) -> Attribution:
    """Fall of the target when one token alone is removed: one forward per token."""

    def scores(model: Any, tokens: Tensor, target: Target, mask: Tensor) -> Float[Tensor, "batch pos"]:
        return one_by_one(TextRemoval(model, tokens, mask, target, baseline, seed), mask.bool())

    return scores


def random_order(seed: int = 0) -> Attribution:
    """Scores without meaning: what every method must beat."""

    def scores(model: Any, tokens: Tensor, target: Target, mask: Tensor) -> Tensor:
        return torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return scores
