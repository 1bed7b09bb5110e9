"""Anatomy of a model: where each operation has its HookPoints. The only place that knows TransformerLens's component classes."""

from lens_relevance.sites.anatomy import Anatomy, anatomy
from lens_relevance.sites.base import LOGITS, Site
from lens_relevance.sites.declared import activation, attention, declare_sites, gated_activation, linear, norm
from lens_relevance.sites.token_sets import TokenAttention

__all__ = [
    "LOGITS",
    "Anatomy",
    "Site",
    "TokenAttention",
    "activation",
    "anatomy",
    "attention",
    "declare_sites",
    "gated_activation",
    "linear",
    "norm",
]
