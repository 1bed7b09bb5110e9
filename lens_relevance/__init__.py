"""Relevance at every HookPoint of a TransformerBridge: propagation rules (AttnLRP and its kin, exact pair rules) in one backward pass."""

from lens_relevance._version import __version__
from lens_relevance.attention_methods import TokenRelevance, TokenSetsRelevance, head_flow, token_relevance
from lens_relevance.cache import RelevanceCache
from lens_relevance.coverage_table import Coverage, coverage
from lens_relevance.dictionaries import Dictionary, read_dictionaries, read_dictionary
from lens_relevance.engine import attach, propagate
from lens_relevance.errors import CoverageError, LivenessError, MismatchError, NotKeptError, RelevanceError
from lens_relevance.inputs.references import mean_embedding, random_tokens, zero_embedding
from lens_relevance.inputs.similarity import sentence_embeddings, similarity
from lens_relevance.inputs.targets import Target, continuation, latent, log_prob, logit, logit_diff
from lens_relevance.memory.estimate_of_run import Estimate
from lens_relevance.memory.estimation import estimate
from lens_relevance.rules import ElementwiseRule, ProductRule, Rule, Scale
from lens_relevance.ruleset_tables import register_ruleset, rulesets
from lens_relevance.sites import AttentionFamily, ExpertsFamily, declare_sites, register_attention, register_experts

__all__ = [
    "AttentionFamily",
    "Coverage",
    "CoverageError",
    "Dictionary",
    "ElementwiseRule",
    "Estimate",
    "ExpertsFamily",
    "LivenessError",
    "MismatchError",
    "NotKeptError",
    "ProductRule",
    "RelevanceCache",
    "RelevanceError",
    "Rule",
    "Scale",
    "Target",
    "TokenRelevance",
    "TokenSetsRelevance",
    "__version__",
    "attach",
    "continuation",
    "coverage",
    "declare_sites",
    "estimate",
    "head_flow",
    "latent",
    "log_prob",
    "logit",
    "logit_diff",
    "mean_embedding",
    "propagate",
    "random_tokens",
    "read_dictionaries",
    "read_dictionary",
    "register_attention",
    "register_experts",
    "register_ruleset",
    "rulesets",
    "sentence_embeddings",
    "similarity",
    "token_relevance",
    "zero_embedding",
]
