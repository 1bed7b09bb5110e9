"""What lens_relevance needs of a model: protocols, so that a TransformerBridge and a module of the user's own are typed alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeGuard, cast, runtime_checkable

from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge


@runtime_checkable
class HookedModel(Protocol):
    """A torch module with HookPoints: a TransformerBridge, or a HookedRootModule whose operations `declare_sites` has named.

    Both have `hook_dict`, from names to HookPoints. It is no member of this protocol, because a model without it has to reach
    `propagate`, which says what is missing. Everything else (`cfg`, `tokenizer`, `original_model`) is optional.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


class TextModel(HookedModel, Protocol):
    """A model that reads text."""

    tokenizer: Any

    def to_tokens(self, input: str, *, prepend_bos: bool | None = None, truncate: bool = True) -> Tensor: ...


def has_tokenizer(model: HookedModel) -> TypeGuard[TextModel]:
    """Whether text can be given to the model, and not token ids alone."""
    return getattr(model, "tokenizer", None) is not None


def is_bridge(model: HookedModel) -> TypeGuard[TransformerBridge]:
    """Whether this is a TransformerBridge, and not a model of the user's own with declared sites."""
    return hasattr(model, "original_model") and hasattr(model, "adapter")


def root(model: HookedModel) -> nn.Module:
    """The module whose call is one forward: what a bridge wraps, or the model itself."""
    return model.original_model if is_bridge(model) else cast(nn.Module, model)


def modules_of(*starts: HookedModel | nn.Module) -> list[nn.Module]:
    """All modules below these, each once. `Module.modules` hands each through every module above it, which takes several times as long."""
    found: dict[int, nn.Module] = {}
    left = [cast(nn.Module, start) for start in reversed(starts)]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:  # HookPoints, which are most of them, have none
                left += [child for child in reversed(module._modules.values()) if child is not None]
    return list(found.values())


def parameters_of(*starts: HookedModel | nn.Module) -> list[nn.Parameter]:
    """All parameters of the modules below these, each once."""
    held = (parameter for module in modules_of(*starts) for parameter in module._parameters.values())
    return list({id(parameter): parameter for parameter in held if parameter is not None}.values())
