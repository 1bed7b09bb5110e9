"""All attribution methods by name. Ranking, comparison, circuits, perturbation tests and the command line choose from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from analyses.methods.base import Estimator
from analyses.methods.ruleset_method import by_ruleset
from lens_relevance import RelevanceError
from lens_relevance.ruleset_tables import Table, rulesets

BASELINES = ("patching", "random", "occlusion")
"""Names of what methods are compared with; no method can have them."""

_METHODS: dict[str, Callable[[], Estimator]] = {}


def register_method(name: str, method: Estimator | Callable[[], Estimator]) -> None:
    """Make an attribution method available by name, wherever a method is chosen.

        register_method("relp_twice", lambda: by_ruleset(my_table))

    Args:
        method: an Estimator, or a function without arguments that makes one; it gets `name` as its name.

    Raises:
        RelevanceError: the name is taken, by a method, a ruleset or a baseline.
    """
    if name in method_names() or name in BASELINES:
        raise RelevanceError(f"a method named {name!r} exists already; choose another name")
    _METHODS[name] = (lambda: method) if isinstance(method, Estimator) else method


def method_names() -> list[str]:
    """Names of all methods: every ruleset is one."""
    return [*rulesets(), *_METHODS]


def estimator(method: str | Table | Estimator) -> Estimator:
    """A method by name, with its default settings; a table of rules as a method; an Estimator as it is.

    Raises:
        RelevanceError: there is no such method, or the table is not one.
    """
    if isinstance(method, Estimator):
        return method
    if not isinstance(method, str):
        return by_ruleset(method)
    if method in _METHODS:
        return replace(_METHODS[method](), name=method)
    if method in rulesets():
        return by_ruleset(method)
    raise RelevanceError(f"unknown method {method!r}; choose one of {', '.join(method_names())}, or register_method one of your own")
