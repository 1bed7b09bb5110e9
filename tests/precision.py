"""A test-only way to run Llama-type models wholly in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

_CASTS = ("float", "to", "type", "softmax")  # all by which the models cast; `torch.nn.functional.softmax` calls the last one
_FLOAT = Tensor.float
_depth = 0


def upcasts_are_stopped() -> bool:
    """Whether this is inside `no_upcasts`."""
    return _depth > 0


def _without_upcast(cast: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a tensor that keeps float64 where it is asked for float32."""

    @wraps(cast)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dtype == torch.float64:
            if cast is _FLOAT:
                return x
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return cast(x, *args, **kwargs)

    return call


@contextmanager
def no_upcasts() -> Iterator[None]:
    """Stop "upcasts" to float32 of tensors that are float64: `.to(torch.float32)`, `.float()`, `softmax(..., dtype=torch.float32)`.

    Hugging Face's RMSNorm, rotary tables and some softmaxes compute in float32 whatever the model's dtype, for the sake of bf16.
    In a float64 model that is a loss of nine digits, which would hide an error of 1e-8 in a rule.

    The few methods that cast are exchanged: a mode of torch's, which every function passes, would take a fifth of the time of some tests.
    """
    global _depth
    with pytest.MonkeyPatch.context() as patch:
        for name in _CASTS:
            patch.setattr(Tensor, name, _without_upcast(getattr(Tensor, name)))
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
