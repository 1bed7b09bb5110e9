"""Errors of the package. Each message names the thing and the remedy."""

from __future__ import annotations


class RelevanceError(ValueError):
    """Base of all errors that lens_relevance raises about its input."""


class LivenessError(RelevanceError):
    """A rule was put on a HookPoint that the model does not go on with, so that it would have done nothing."""


class MismatchError(RelevanceError):
    """A component computes something else than its site says, so that relevance would be wrong there."""


class CoverageError(RelevanceError):
    """Part of the model has no site, so that a ruleset would only hold for the rest of it."""


class NotKeptError(RelevanceError, KeyError):
    """A RelevanceCache was asked for something that was not kept."""

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0]) if self.args else ""


class OutOfRangeError(RelevanceError, IndexError):
    """A layer, head, neuron, position or row was asked for that there is not. It ends a loop over rows as an IndexError does."""
