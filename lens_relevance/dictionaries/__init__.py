"""Sparse autoencoders and transcoders: what they are, and how their files are read."""

from lens_relevance.dictionaries.activation import FeatureActivation, Gated, JumpReLU, ReLU, TopK
from lens_relevance.dictionaries.dictionary import Dictionary
from lens_relevance.dictionaries.reading import read_dictionaries, read_dictionary

__all__ = ["Dictionary", "FeatureActivation", "Gated", "JumpReLU", "ReLU", "TopK", "read_dictionaries", "read_dictionary"]
