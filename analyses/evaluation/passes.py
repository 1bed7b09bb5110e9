"""What a computation costs: passes through the model and processor time, counted and not estimated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance.sites import anatomy


@dataclass
class Cost:
    """Tokens that went forwards and backwards through the last block, and seconds of processor time, of all threads."""

    forward_tokens: int = 0
    backward_tokens: int = 0
    seconds: float = 0.0


@contextmanager
def counted(model: TransformerBridge) -> Iterator[Cost]:
    """The cost of what happens while the block lasts; it is complete when the block has ended.

    Tokens are counted, and not calls, so that a pass over eight rows side by side counts eight times, and one over a part of a prompt as
    that part. Nothing is attached to the model: torch calls a hook of every module.
    """
    cost, last = Cost(), model.get_submodule(anatomy(model).blocks[-1].path)

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        stream = output[0] if isinstance(output, tuple) else output
        if module is not last or not isinstance(stream, Tensor):
            return
        tokens = stream.shape[0] * stream.shape[1]
        cost.forward_tokens += tokens
        if stream.requires_grad:
            stream.register_hook(lambda gradient: _add(cost, tokens))

    handle = register_module_forward_hook(count)
    began = time.process_time()
    try:
        yield cost
    finally:
        cost.seconds = time.process_time() - began
        handle.remove()


def _add(cost: Cost, tokens: int) -> None:
    cost.backward_tokens += tokens
