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
