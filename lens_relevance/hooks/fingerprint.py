"""What a model computes with, in one number that is cheap to take: it changes when a module, its forward, a hook or a setting does."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformer_lens.hook_points import HookPoint

from lens_relevance.hooked_model import modules_of, root
from lens_relevance.ruleset_tables import PLAIN
from lens_relevance.sites import Anatomy

_SETTINGS = (bool, int, float, str, type(None))
_OF_TORCH = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set)))  # its own books on each module


class Checked:
    """Models whose forward was compared with their sites, each as it was then."""

    def __init__(self) -> None:
        self._as: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def holds(self, model: Any, anatomy: Anatomy) -> bool:
        """Whether a model was compared, as it is, with these sites."""
        return model in self._as and self._as[model] == fingerprint(model, anatomy)

    def add(self, model: Any, anatomy: Anatomy) -> None:
        """Note that a model was compared, as it is, with these sites."""
        self._as[model] = fingerprint(model, anatomy)


def fingerprint(model: Any, anatomy: Anatomy) -> int:
    """A number made of a model's modules, their forwards, hooks, functions and settings, its configs and its sites; weights are left out.

    Hooks of HookPoints are left out too, but for those inside a mixture of experts: the others act between operations, and change none.
    """
    parts: list[Any] = [(site.name, site.output_name, site.enabled(PLAIN), type(site.operation)) for site in anatomy.sites]
    parts += [id(hook) for point in anatomy.inside_experts for hook in point.fwd_hooks]
    parts += [_settings(vars(config)) for config in (getattr(root(model), "config", None), getattr(model, "cfg", None)) if config]
    modules = [module for module in modules_of(model, root(model)) if not isinstance(module, HookPoint)]
    for module in modules:
        parts.append((id(module), *module._forward_hooks, *module._forward_pre_hooks, _settings(module.__dict__)))  # each hook has a number
    classes = dict.fromkeys(map(type, modules))
    parents = dict.fromkeys(parent for kind in classes for parent in kind.__mro__)
    parts += [tuple(map(id, vars(parent).values())) for parent in parents]
    parts += [tuple(map(id, vars(sys.modules[name]).values())) for name in dict.fromkeys(kind.__module__ for kind in classes)]
    return hash(tuple(parts))


def _settings(attributes: dict[str, Any]) -> tuple[Any, ...]:
    """Numbers, words and functions among attributes, but for what a library notes for itself (how many blocks of hooks are open)."""
    found: list[Any] = []
    for name, value in attributes.items():  # a loop, as this runs over all modules at every call
        if name in _OF_TORCH:
            continue
        if isinstance(value, _SETTINGS):
            if name[:1] != "_" and name != "context_level":
                found += (name, value)
        elif callable(value):
            found += (name, id(value))
    return tuple(found)
