"""Tiny models that are built once for many tests: to build one takes longer than most of what tests do with it.

`Family.build` hands out a model that an earlier test has left exactly as it was built: its modules, hooks, attributes, settings and weights
are compared with those at its building. A model that a test has changed, or that something still holds, is not handed out again; no test is
handed a model that it has already. So a test may do with a model what it likes, and tests may run in any order.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any
from unittest.mock import patch
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.block import BlockBridge
from transformers import GenerationConfig, PreTrainedConfig

from analyses.benchmarks.tiny_models import Family
from lens_relevance.engine import CHECKED
from lens_relevance.hooked_model import modules_of, root
from tests.precision import upcasts_are_stopped

KEPT = 128  # models that wait for the next test: those used last

# What a forward leaves on a model; it is put back before the comparison. Of TransformerLens, but for the last one; besides it are hooks.
LEFT_BY_A_FORWARD = frozenset(
    {
        "_attn_scores",
        "_pattern",
        "_block_alias_cache",
        "_current_batch_size",
        "_captured_pre_ln_residual",
        "_ln1_module",
        "_suppress_next_hook_in",
        "_fired_hook_out",
        "_derived_position_ids_ok",
        "_output_capturing_hooks_installed",
    }
)
_HUGGING_FACES_HOOK = "install_output_capuring_hook.<locals>.output_capturing_hook"

_CONTAINERS = (dict, list, tuple, set, frozenset)
_BOOKS = frozenset({dict, OrderedDict, list, set})
_SETTINGS = (PreTrainedConfig, GenerationConfig, TransformerBridgeConfig)
_VALUES = (bool, int, float, str, bytes, torch.dtype, torch.device)


class Lent:
    """Models that are in use, and those that wait to be handed out again."""

    def __init__(self, kept: int) -> None:
        self.in_use: list[Built] = []
        self._free: OrderedDict[str, Built] = OrderedDict()
        self._kept = kept

    def lend(self, key: str, make: Callable[[], TransformerBridge]) -> TransformerBridge:
        """The model of this key that waits, or a new one."""
        built = self._free.pop(key, None)
        if built is None or not built.has_usual_classes():
            with _without_garbage():
                built = Built(key, make())
            built.held_by = sys.getrefcount(built.model)
        self.in_use.append(built)
        return built.model

    def take_back(self) -> None:
        """Take back what is as it was built and what nothing else holds."""
        while self.in_use:
            built = self.in_use.pop()
            if built.has_usual_classes() and built.is_as_built():
                built.forget()
                self._free[built.key] = built
        while len(self._free) > self._kept:
            self._free.popitem(last=False)


class SharedModels:
    """Stands for `Family.build`, the method that it is made with, while it is open."""

    def __init__(self, build: Callable[..., TransformerBridge]) -> None:
        self._build = build
        self.models = Lent(KEPT)
        self.is_open = False

    def build(self, family: Family, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> TransformerBridge:
        """A model as `Family.build` gives it; it leaves the random state as it was."""
        with torch.random.fork_rng(devices=[]):
            # What is built under a mode of torch's, or with another default dtype, may depend on it.
            has_mode = bool(_get_current_function_mode_stack()) or _get_current_dispatch_mode() is not None
            usual = not has_mode and torch.get_default_dtype() == torch.float32
            if not self.is_open or not usual:
                return self._build(family, dtype, seed, **settings)
            key = repr((family, dtype, seed, sorted(settings.items()), upcasts_are_stopped()))
            return self.models.lend(key, lambda: self._build(family, dtype, seed, **settings))


@contextmanager
def _without_garbage() -> Iterator[None]:
    """What is made inside and in nobody's hands at the end is freed, reference cycles too."""
    was_enabled = gc.isenabled()
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        gc.collect(0)
        if was_enabled:
            gc.enable()


@contextmanager
def _hook_points_have_no_parts() -> Iterator[None]:
    """Most modules of a bridge are HookPoints. TransformerLens looks for others among their attributes, and PyTorch sets their train mode
    by way of their parts, which they have none of: half of the time that it takes to make a bridge."""

    def train(point: HookPoint, mode: bool = True) -> HookPoint:
        vars(point)["training"] = mode
        return point

    with patch.object(HookPoint, "__dir__", lambda point: (), create=True), patch.object(HookPoint, "train", train, create=True):
        yield


class Built:
    """A model and how it was built."""

    def __init__(self, key: str, model: TransformerBridge) -> None:
        self.key, self.model = key, model
        self._modules = modules_of(model, root(model))
        self._left = [{name: value for name, value in vars(each).items() if name in LEFT_BY_A_FORWARD} for each in self._modules]
        self._state = state_of(model)
        self.held_by = 0

    def has_usual_classes(self) -> bool:
        """Whether a model built now would have the same classes: a test may put one of its own in the place of a library's."""
        return all(map(_stands_in_its_module, {type(module) for module in self._modules}))

    def is_as_built(self) -> bool:
        """Whether the model can be handed out again."""
        if sys.getrefcount(self.model) != self.held_by:
            gc.collect(1)  # what the test has left in reference cycles, an exception and its frames for one
            if sys.getrefcount(self.model) != self.held_by:
                return False
        for module, left in zip(self._modules, self._left, strict=True):
            _undo_forward(module, left)
        return same(self._state, state_of(self.model, copies=False))

    def forget(self) -> None:
        """Let the packages forget what they have noted of the model and its modules: the next call is a first call."""
        modules = set(self._modules)
        for memory in _memories(len(sys.modules)):
            for module in modules & set(memory):
                del memory[module]


def _stands_in_its_module(kind: type[nn.Module]) -> bool:
    name = kind.__module__
    return not name.startswith("tests.") and getattr(sys.modules[name], kind.__qualname__, kind) is kind


@lru_cache(1)
def _memories(n_modules: int) -> list[WeakKeyDictionary[Any, Any]]:
    """All that the packages note of models, once for as long as no module is imported."""
    owners = [module for name, module in sys.modules.items() if name.split(".")[0] in ("lens_relevance", "analyses")]
    values = [CHECKED._as, *(value for owner in owners for value in vars(owner).values())]
    return list({id(value): value for value in values if isinstance(value, WeakKeyDictionary)}.values())


def _undo_forward(module: nn.Module, left: dict[str, Any]) -> None:
    """Take back what forwards have left on a module; left: what was there before."""
    if isinstance(module, BlockBridge):
        module._teardown_capture_hooks()
    for key, hook in list(module._forward_hooks.items()):
        if getattr(hook, "__qualname__", "") == _HUGGING_FACES_HOOK:
            del module._forward_hooks[key]
    if not module._backward_hooks and not module._backward_pre_hooks:  # PyTorch's note of the kind that they had
        module._is_full_backward_hook = None
    for name in LEFT_BY_A_FORWARD & vars(module).keys():
        if name in left:
            vars(module)[name] = left[name]
        else:
            del vars(module)[name]


def state_of(model: TransformerBridge, *, copies: bool = True) -> list[Any]:
    """All that tells a model from another one: its modules, what they have, and copies of tensors, or the tensors detached."""
    state: list[Any] = []
    for module in modules_of(model, root(model)):
        state += (module, type(module))
        _add(vars(module), state, copies)
    adapter = getattr(model, "adapter", None)
    if adapter is not None:
        _add(vars(adapter), state, copies)
    return state


def _add(value: Any, state: list[Any], copies: bool) -> None:
    if isinstance(value, dict):
        state.append(len(value))
        for name, each in value.items():
            state.append(name)
            if each is None or isinstance(each, _VALUES):
                state.append(each)
            elif type(each) in _BOOKS and not each:  # of PyTorch on every module, most of them empty
                state.append(0)
            else:
                _add(each, state, copies)
    elif isinstance(value, _CONTAINERS):
        state.append(len(value))
        for each in value:
            _add(each, state, copies)
    elif isinstance(value, Tensor):
        data = value.detach()
        state += (value, value.requires_grad, value.grad if value.is_leaf else None, data.clone() if copies else data)
    elif isinstance(value, _SETTINGS):
        state.append(value)
        _add(vars(value), state, copies)
    else:
        state.append(value)


def same(one: list[Any], two: list[Any]) -> bool:
    """Whether two states are of the same model, unchanged."""
    return len(one) == len(two) and all(a is b or _equal(a, b) for a, b in zip(one, two, strict=True))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not isinstance(a, nn.Parameter):
        return a.dtype == b.dtype and torch.equal(a, b)
    return isinstance(a, _VALUES) and type(a) is type(b) and a == b


SHARED = SharedModels(Family.build)


def install() -> None:
    """Let `Family.build` share models, where tests of their own ask for them, and let bridges be made faster."""

    def make(self: TransformerBridge, *args: Any, **kwargs: Any) -> None:
        with _hook_points_have_no_parts():
            library(self, *args, **kwargs)

    library = TransformerBridge.__init__
    TransformerBridge.__init__ = wraps(library)(make)  # type: ignore[method-assign]

    def build(self: Family, dtype: torch.dtype = torch.float64, seed: int = 0, **settings: object) -> TransformerBridge:
        return SHARED.build(self, dtype, seed, **settings)

    Family.build = wraps(Family.build)(build)  # type: ignore[method-assign]
