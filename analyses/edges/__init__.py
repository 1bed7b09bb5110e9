"""Relevance over every edge of the residual stream, exact, from one backward pass."""

from analyses.edges.attribution import EdgeAttribution, attribute_edges

__all__ = ["EdgeAttribution", "attribute_edges"]
