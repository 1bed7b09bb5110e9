"""What a run is known by: its model as it computes, with its hooks, its pairs, its target, and its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from analyses.datasets.batches import rows_together
from analyses.datasets.checkpoint import NUMBERS, digest, tensor_bytes
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, __version__, propagate
from lens_relevance.hooked_model import root
from lens_relevance.inputs.functions import random_logits
from lens_relevance.inputs.metrics import by_position
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.targets import CallableTarget, as_target

_DRAWN = 1024  # logits of one batch


def fingerprint(model: Any, sets_of_pairs: Mapping[str, PromptPairs], size: int, **settings: Any) -> dict[str, Any]:
    """What a run is known by, as JSON can hold it.

    Hashes of the weights, of buffers (rotary frequencies, which no state_dict has) and of the pairs; this version; the settings; and
    numbers that tell apart what cannot be read off (another hook at the same HookPoint, another function as target): the logits that the
    model with its hooks gives on the first batch of each set of pairs, the target's values there, and the relevance of its tokens under
    the plain gradient, which changes with hooks that act on the backward alone.

    Args:
        sets_of_pairs: by what they are for.
        size: pairs per batch.
        settings: everything else that the results depend on.
    """
    numbers: dict[str, Any] = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    for name, pairs in sets_of_pairs.items():
        numbers |= {f"{what} ({name})": values.detach().double().flatten().tolist() for what, values in _numbers(model, pairs, size)}
    return {
        "model": digest(_held(model)),
        "hooks on the model": sorted(name for name, point in model.hook_dict.items() if point.has_hooks()),
        **{name: _digest_of_pairs(pairs) for name, pairs in sets_of_pairs.items()},
        "lens_relevance": __version__,
        **settings,
        NUMBERS: numbers,
    }


def _held(model: Any) -> Iterator[tuple[str, bytes]]:
    """Weights and buffers, one after the other: copies of all at once might not fit."""
    held = {**dict(root(model).named_buffers()), **model.state_dict()}
    return ((name, tensor_bytes(tensor)) for name, tensor in sorted(held.items()) if isinstance(tensor, Tensor))


def _digest_of_pairs(pairs: PromptPairs) -> str:
    tokens = [(name, tensor_bytes(getattr(pairs, name))) for name in ("clean", "corrupt", "clean_mask", "corrupt_mask")]
    return digest([*tokens, ("target", json.dumps(_plain(pairs.target)).encode())])


def _numbers(model: Any, pairs: PromptPairs, size: int) -> Iterator[tuple[str, Tensor]]:
    """What the model and the target give on the first batch, and a function as target on every row."""
    together = rows_together(model, as_target(pairs.target), pairs.clean, mask=pairs.clean_mask, size=size)
    batch = pairs[:together]
    target = as_target(batch.target)
    for name, tokens, mask in (("clean", batch.clean, batch.clean_mask), ("corrupt", batch.corrupt, batch.corrupt_mask)):
        tokens, mask = target.extend(model, tokens, mask)
        with torch.no_grad():
            logits = Prompt(tokens, mask).call(model)
            if target.point is None:
                yield f"the target on {name} prompts", target.metric(model, tokens, mask)(by_position(logits))
        real = logits[mask.bool()] if logits.shape[:2] == mask.shape else logits  # padding may hold anything
        drawn = torch.randint(real.numel(), (_DRAWN,), generator=torch.Generator().manual_seed(0))
        yield f"logits of {name} prompts", real.flatten()[drawn.to(real.device)]
    try:
        yield "the gradient", propagate(model, batch.clean, target, rules="gradient", attention_mask=batch.clean_mask).tokens()
    except RelevanceError:
        pass  # where there is none: analyses that need it say so, others go on
    if isinstance(target, CallableTarget):  # it can hold something for each row, the later ones too
        like = torch.empty(0, pairs.clean.shape[1], int(model.cfg.d_vocab), device=logits.device)
        values = [rows.metric(model)(random_logits(len(rows), like).to(logits.dtype)) for rows in pairs.batches(together)]
        yield "the target on random logits", torch.cat([value.reshape(-1) for value in values])


def _plain(value: Any) -> Any:
    """A target, with all its tensors, as JSON can hold it."""
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__} | {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
