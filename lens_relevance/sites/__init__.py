"""Anatomy of a model: where each operation has its HookPoints. The only place that knows TransformerLens's component classes."""

from lens_relevance.sites.anatomy import Anatomy, anatomy
from lens_relevance.sites.base import LOGITS, Site

__all__ = ["LOGITS", "Anatomy", "Site", "anatomy"]
