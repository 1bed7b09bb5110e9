"""The state of the user's model: what a call changes on it is put back, also after an exception or Ctrl-C."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, is_bridge, modules_of, parameters_of, root
from lens_relevance.hooks.interrupts import protected_contextmanager
from lens_relevance.hooks.versions import warn_if_untested

P = ParamSpec("P")
T = TypeVar("T")

# Where torch and TransformerLens keep the hooks of a module.
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks"),
    *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "fwd_hooks", "bwd_hooks"),
)


@protected_contextmanager
def no_gradients() -> Iterator[None]:
    """`torch.no_grad`, of which an interrupt leaves nothing behind."""
    with torch.no_grad():
        yield


@protected_contextmanager
def frozen(model: HookedModel) -> Iterator[None]:
    """No parameter asks for a gradient inside; each flag is put back as it was found."""
    asked = [parameter for parameter in parameters_of(model, root(model)) if parameter.requires_grad]
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


@protected_contextmanager
def as_found(model: HookedModel) -> Iterator[None]:
    """Whatever an interrupt cuts inside (TransformerLens's own clean-up, ours), the model and autograd are put back as they were before.

    That is: hooks, flags of modules (train or eval, and what TransformerLens notes during a forward), requires_grad, and whether gradients
    are recorded. Nothing is done where no interrupt came, so what a block changes for good stays.
    """
    modules = modules_of(model, root(model))
    hooks = [(held, held.copy()) for module in modules for name in _HOOKS if (held := vars(module).get(name)) is not None]
    flags = [(vars(module), _flags(module)) for module in modules]
    asked = [(parameter, parameter.requires_grad) for parameter in parameters_of(model, root(model))]
    recorded, level = torch.is_grad_enabled(), vars(model).get("context_level")  # of TransformerLens's hooks
    try:
        yield
    except Exception:
        raise
    except BaseException:  # KeyboardInterrupt; an ordinary exception cuts no clean-up
        for held, before in hooks:
            held.clear()
            held.extend(before) if isinstance(held, list) else held.update(before)
        for module, (attributes, before) in zip(modules, flags, strict=True):
            for name in _flags(module).keys() - before.keys():  # the class has what an instance lacks
                del attributes[name]
            attributes.update(before)
        for parameter, flag in asked:
            parameter.requires_grad_(flag)
        torch.set_grad_enabled(recorded)
        if level is not None:
            vars(model)["context_level"] = level
        raise


def end_interrupted_calls(model: HookedModel) -> None:
    """Put back what TransformerLens notes on a module for the time of one call, where Ctrl-C has cut the call."""
    for module in root(model).modules():
        if vars(module).get("_suppress_next_hook_in"):  # or the next call would go past a hook
            vars(module)["_suppress_next_hook_in"] = False


def _flags(module: torch.nn.Module) -> dict[str, bool | None]:
    return {name: value for name, value in vars(module).items() if value is None or isinstance(value, bool)}


def left_as_found(analysis: Callable[P, T]) -> Callable[P, T]:
    """An analysis of a model (its first argument, or `model`) that runs in `as_found`."""

    @wraps(analysis)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        with as_found(cast(HookedModel, args[0] if args else kwargs["model"])):
            return analysis(*args, **kwargs)

    return guarded


def check_model(model: HookedModel) -> None:
    """Refuse states of the model in which relevance would be wrong without anybody noticing."""
    warn_if_untested()
    if not (is_bridge(model) or hasattr(model, "hook_dict")):  # a bridge makes its one anew whenever it is asked for
        raise RelevanceError(
            f"{type(model).__name__} has no HookPoints: give a TransformerBridge (load_model, TransformerBridge.boot_transformers) or a "
            "HookedRootModule with declare_sites"
        )
    if torch.is_inference_mode_enabled():
        raise RelevanceError(
            "relevance needs autograd, which torch.inference_mode() forbids; use torch.no_grad() instead, or leave the block"
        )
    modules = modules_of(model)
    if any(map(_is_compiled, [root(model), *modules])):
        raise RelevanceError(
            "the model is compiled (torch.compile): rules act on its modules, which compiled code does not call. Give the model "
            "as it was before: what torch.compile was called with, or a model loaded anew"
        )
    if any(module.training for module in modules):
        training = next((name for name, module in model.named_modules() if module.training), "")
        raise RelevanceError(
            f"the model is in train mode ({training or 'the model itself'}), where dropout makes relevance random; call model.eval()"
        )
    if getattr(model, "_weights_processed", False):
        warnings.warn(
            "this model's weights were processed (process_weights or enable_compatibility_mode): norms are folded and weights "
            "centred, so raw logits are shifted and relevance is that of the processed model",
            stacklevel=4,
        )


def _is_compiled(module: torch.nn.Module) -> bool:
    # torch.compile(module), module.compile(), and a forward that was replaced by its compiled form
    return (
        "_orig_mod" in module._modules
        or module._compiled_call_impl is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def check_forward(model: HookedModel, kwargs: dict[str, Any]) -> None:
    """Refuse forwards on which rules would be wrong without anybody noticing."""
    if kwargs.get("past_key_values") is not None:
        raise RelevanceError("relevance needs the whole sequence: pass all tokens at once instead of past_key_values (a KV cache)")
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(getattr(model, "cfg", None), flag, False):
            raise RelevanceError(
                f"{flag} is on: TransformerLens then runs the raw norm once per head, past any rule on it. Turn it off "
                f"(model.set_{flag}(False)); edges are available without it from analyses.flow_graph"
            )
    if root(model).training:
        raise RelevanceError("the model is in train mode, where dropout would make relevance random; call model.eval() first")
