"""Anatomy of a model: where each operation has its HookPoints. The only place that knows TransformerLens's component classes."""

from lens_relevance.sites import attention_families, expert_families  # noqa: F401 - the families that are known register themselves
from lens_relevance.sites.anatomy import Anatomy
from lens_relevance.sites.base import LOGITS, DeclaredSite, Site
from lens_relevance.sites.declared import activation, attention, convolution, declare_sites, gated_activation, linear, norm
from lens_relevance.sites.families import AttentionFamily, ExpertsFamily, register_attention, register_experts
from lens_relevance.sites.hooked_module import HookedModule, sharing_copies
from lens_relevance.sites.lookup import anatomy
from lens_relevance.sites.token_sets import TokenAttention

__all__ = [
    "LOGITS",
    "Anatomy",
    "AttentionFamily",
    "DeclaredSite",
    "ExpertsFamily",
    "HookedModule",
    "Site",
    "TokenAttention",
    "activation",
    "anatomy",
    "attention",
    "convolution",
    "declare_sites",
    "gated_activation",
    "linear",
    "norm",
    "register_attention",
    "register_experts",
    "sharing_copies",
]
