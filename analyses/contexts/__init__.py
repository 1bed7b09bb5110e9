"""Contexts by relevance: the texts of a corpus in which each neuron or head is most relevant, or most active."""

from analyses.contexts.atlas import Atlas
from analyses.contexts.build import build_atlas
from analyses.contexts.page import contexts_page

__all__ = ["Atlas", "build_atlas", "contexts_page"]
