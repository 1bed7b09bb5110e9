"""Token-to-token relevance from attention as an attribution method: heads of pairs, tokens of single prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.methods.base import Estimator, Scores
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError
from lens_relevance.attention_methods import METHODS, TokenSetsRelevance, token_relevance
from lens_relevance.attention_methods.methods import ALIASES
from lens_relevance.hooked_model import HookedModel
from lens_relevance.ruleset_tables import Table, ruleset_name


def by_attention(method: str, importance: str = "relevance", rules: str | Table | None = None) -> Estimator:
    """Token-to-token relevance (`lens_relevance.attention_methods`): the part of the explained token's scores that passes a head.

    These methods see the clean prompt alone and mostly have no sign: they can find the heads that matter, but not which way they push.

    Source: that of the method, see `token_relevance`; what part of the scores passes a head is derived here.

    Args:
        method, importance, rules: as for `token_relevance`.

    Raises:
        RelevanceError: the model has several token sets, and it is not said which is meant.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        result = token_relevance(
            model, pairs.clean, pairs.target, method=method, importance=importance, rules=rules, attention_mask=pairs.clean_mask
        )
        return {"heads": result.heads} if components else {}

    def tokens(
        model: HookedModel,
        inputs: Any,
        target: Any,
        *,
        attention_mask: Tensor | None = None,
        reference: Any = None,
        stack: str | None = None,
    ) -> Tensor:
        result = token_relevance(model, inputs, target, method=method, importance=importance, rules=rules, attention_mask=attention_mask)
        if not isinstance(result, TokenSetsRelevance):
            return result.scores
        if stack not in result.scores:
            raise RelevanceError(f"this model has the token sets {', '.join(result.scores)}: say which is meant (stack=...)")
        return result.scores[stack]

    known = METHODS.get(ALIASES.get(method, method))
    two = known is not None and known.two_gradients and ruleset_name(known.rules if rules is None else rules) != "gradient"
    runs = 2 if two else 1
    return Estimator(method, scores, forwards=runs, backwards=runs, components=("heads",), single_run=True, tokens=tokens)
