"""The anatomy of a model at hand: what was declared for it, what the component tree of a bridge gives, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, is_bridge
from lens_relevance.sites.anatomy import Anatomy
from lens_relevance.sites.base import DeclaredSite
from lens_relevance.sites.component_tree import bridge_anatomy

_DECLARED: WeakKeyDictionary[Any, Anatomy] = WeakKeyDictionary()  # of models of the user's own
_ADDED: WeakKeyDictionary[Any, list[DeclaredSite]] = WeakKeyDictionary()  # to what is found on a bridge


def anatomy(model: HookedModel) -> Anatomy:
    """The anatomy of a model.

    Raises:
        RelevanceError: the model is no TransformerBridge, and no sites were declared for it.
    """
    if model in _DECLARED:
        return _DECLARED[model]
    if not is_bridge(model):
        raise RelevanceError(
            f"expected a TransformerBridge, got {type(model).__name__}; load one with TransformerBridge.boot_transformers, or "
            "tell where the operations of a model of your own are with lens_relevance.declare_sites"
        )
    return _with(bridge_anatomy(model), _ADDED.get(model, []))


def remember(model: HookedModel, declared: Anatomy) -> None:
    """Use this anatomy for a model of the user's own from now on."""
    declared.count_layers()
    _DECLARED[model] = declared


def remember_more(model: HookedModel, sites: Sequence[DeclaredSite]) -> None:
    """Add these sites to those found on a bridge from now on; a site at the output of one that was added before takes its place.

    Raises:
        RelevanceError: a site has the name of another one.
    """
    assert is_bridge(model)
    outputs = {site.output for site in sites}
    more = [*(site for site in _ADDED.get(model, []) if site.output not in outputs), *sites]
    _with(bridge_anatomy(model), more)  # refused now, and not in the first forward
    _ADDED[model] = more


def _with(found: Anatomy, sites: Sequence[DeclaredSite]) -> Anatomy:
    for site in sites:
        found.add(site.at({name: found.points[canonical] for name, canonical in found.aliases.items()}))
    found.count_layers()
    return found
