"""A model spread over two devices, on a machine that has none: tensors are told which device they are on, and no operation may mix two.

PyTorch's own rules, as far as they matter here: an operation takes tensors of one device, but for scalars of the CPU, indices of the CPU,
and copies into slices. The arithmetic is that of the CPU, so that results can be compared with those of the plain model. Inside autograd
nothing is checked: gradients are on the device of their tensors by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

from tests import models

CPU, FIRST, SECOND = "cpu", "cuda:0", "cuda:1"
MAP = {"transformer.wte": FIRST, "transformer.wpe": FIRST, "transformer.h.0": FIRST} | dict.fromkeys(
    ("transformer.h.1", "transformer.ln_f", "lm_head"), SECOND
)


def build(spread: bool) -> TransformerBridge:
    """A tiny random GPT-2 on the CPU, or the same with accelerate's hooks as a device map over two devices puts them: `on_two_devices`."""
    config = GPT2Config(
        vocab_size=models.VOCAB_SIZE,
        n_positions=models.N_CTX,
        n_embd=16,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config).eval()
    models.randomize(model, 0)
    if spread:
        for path, device in MAP.items():  # what accelerate's dispatch_model does, but for moving the weights
            part = model.get_submodule(path)
            attach_execution_device_hook(part, CPU)
            if not hasattr(part, "_hf_hook"):
                add_hook_to_module(part, AlignDevicesHook(CPU))
            for module in part.modules():
                if hasattr(module, "_hf_hook"):
                    module._hf_hook.execution_device = torch.device(device)
        add_hook_to_module(model, AlignDevicesHook(CPU, io_same_device=True))
        model._hf_hook.execution_device = torch.device(FIRST)
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config).eval()
    for path, device in MAP.items() if spread else ():  # now, as the bridge has split weights into parts of its own
        for module in model.get_submodule(path).modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    tensor._place = device  # type: ignore[union-attr]
    return bridge


def place(tensor: Tensor) -> str:
    return str(tensor.__dict__.get("_place", CPU))


@contextmanager
def on_two_devices() -> Iterator[None]:
    """Inside, tensors have devices."""
    mode, grad = _Devices(), torch.autograd.grad

    def placed_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            gradients = grad(outputs, inputs, *args, **kwargs)
        for gradient, at in zip(gradients, [inputs] if isinstance(inputs, Tensor) else inputs, strict=True):
            if gradient is not None:
                gradient._place = place(at)
        return gradients

    torch.autograd.grad = placed_grad
    try:
        with mode:
            yield
    finally:
        torch.autograd.grad = grad


class _Devices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device(place(args[0]))
        if func is Tensor.to:
            return _to(*args, **kwargs)
        if func is Tensor.cpu:
            return _to(args[0], CPU)
        if func is Tensor.numpy and place(args[0]) != CPU:
            raise TypeError(f"can't convert a tensor on {place(args[0])} to numpy; use Tensor.cpu() first")
        device = kwargs.pop("device", None)
        where = _common(func, args, kwargs) if device is None else str(device)
        before = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in before:
                leaf._place = where  # type: ignore[attr-defined]
        return result


def _common(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The device of an operation."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func is Tensor.copy_ or (func is Tensor.__setitem__ and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(args[1]))):
        return place(tensors[0])
    if func in (Tensor.__getitem__, Tensor.__setitem__):
        tensors = [tensors[0], *(index for index in tree_leaves(args[1]) if isinstance(index, Tensor) and place(index) != CPU), *args[2:]]
        tensors = [one for one in tensors if isinstance(one, Tensor)]
    places = {place(one) for one in tensors if one.ndim or place(one) != CPU}
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found {sorted(places)} in {getattr(func, '__name__', func)}"
        )
    return places.pop() if places else CPU


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for arg in args:
        if isinstance(arg, Tensor):
            device, dtype = place(arg), arg.dtype
        elif isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, str | torch.device):
            device = arg
    where = place(tensor) if device is None else str(device)
    moved = tensor if dtype is None else tensor.to(dtype)
    if where == place(tensor) and moved is tensor:
        return tensor
    moved = moved.view_as(moved) if moved is tensor else moved
    moved._place = where  # type: ignore[attr-defined]
    return moved
