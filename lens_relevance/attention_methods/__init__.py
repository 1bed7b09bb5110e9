"""Token-to-token relevance from attention: one file per method, all with one signature (`accumulate(run)`)."""

from lens_relevance.attention_methods.head_relevance_flow import head_flow
from lens_relevance.attention_methods.methods import METHODS, token_relevance
from lens_relevance.attention_methods.result import TokenRelevance, TokenSetsRelevance

__all__ = ["METHODS", "TokenRelevance", "TokenSetsRelevance", "head_flow", "token_relevance"]
