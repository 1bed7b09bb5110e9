"""A test-only way to run Llama-type models wholly in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CASTS = (torch.Tensor.float, torch.Tensor.to, torch.Tensor.type)


class NoUpcasts(TorchFunctionMode):
    """Answers a request to turn a float64 tensor into float32 with the tensor as it is."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not kwargs and func not in _CASTS:  # almost always
            return func(*args)
        kwargs = dict(kwargs or {})
        tensor = args[0] if args else None
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
            if func is torch.Tensor.float:
                return tensor
            if func is torch.Tensor.to:
                args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            elif func is torch.Tensor.type and len(args) > 1 and args[1] is torch.float32:
                return tensor
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def no_upcasts() -> Iterator[None]:
    """Stop "upcasts" to float32 of tensors that are float64: `.to(torch.float32)`, `.float()`, `softmax(..., dtype=torch.float32)`.

    Hugging Face's RMSNorm, rotary tables and some softmaxes compute in float32 whatever the model's dtype, for the sake of bf16.
    In a float64 model that is a loss of nine digits, which would hide an error of 1e-8 in a rule.
    """
    with NoUpcasts():
        yield
