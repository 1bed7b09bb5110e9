"""Patterns and their gradients straight from autograd, and Chefer's method as a loop over examples: what the package is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def patterns_and_gradients(model: Any, tokens: Tensor, token: int, position: int = -1) -> tuple[list[Tensor], list[Tensor]]:
    """A and dA per layer, for the logit of one token, by an ordinary hook and torch.autograd."""
    kept: list[Tensor] = []

    def keep(x: Tensor, hook: Any) -> Tensor:
        kept.append(x)
        return x

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(len(model.blocks))]
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logits = model(tokens, return_type="logits", use_cache=False)
    gradients = torch.autograd.grad(logits[:, position, token].sum(), kept)
    return [a.detach() for a in kept], list(gradients)


def chefer_2021b(patterns: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """R of every example, one at a time, as the paper's text has it."""
    results = []
    for example in range(patterns[0].shape[0]):
        r = torch.eye(patterns[0].shape[-1], dtype=patterns[0].dtype)
        for pattern, gradient in zip(patterns, gradients, strict=True):
            heads = [(pattern[example, h] * gradient[example, h]).clamp(min=0) for h in range(pattern.shape[1])]
            r = r + sum(heads) / len(heads) @ r
        results.append(r)
    return torch.stack(results)
