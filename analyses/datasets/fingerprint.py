"""What a run is known by: its model as it computes, hooks and all, its pairs, its target, and its settings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from analyses.datasets.batches import rows_together
from analyses.datasets.checkpoint import digest, tensor_bytes
from analyses.tasks import PromptPairs
from lens_relevance import __version__
from lens_relevance.hooked_model import root
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.targets import as_target

_ROWS = 8
_LOGITS = 1024  # of one run, spread evenly over rows, positions and vocabulary


def fingerprint(model: Any, pairs: PromptPairs, **settings: Any) -> dict[str, Any]:
    """What a run is known by, as JSON can hold it.

    Hashes of the weights, of buffers (rotary frequencies, which no state_dict has) and of the pairs; this version; the settings; and what
    the model with its hooks gives on the first pairs: logits, and the target's values. These tell apart what cannot be read off: another
    hook at the same HookPoint, another function as target.
    """
    hooked = sorted(name for name, point in model.hook_dict.items() if point.has_hooks())
    tokens = [(name, tensor_bytes(getattr(pairs, name))) for name in ("clean", "corrupt", "clean_mask", "corrupt_mask")]
    return {
        "model": digest(_tensors(model)),
        "hooks on the model": hooked,
        "pairs": digest([*tokens, ("target", json.dumps(_plain(pairs.target)).encode())]),
        "lens_relevance": __version__,
        **settings,
        "first batch": _first_batch(model, pairs),
    }


def _tensors(model: Any) -> Iterator[tuple[str, bytes]]:
    """Weights and buffers, one after the other: copies of all at once might not fit."""
    held = {**dict(root(model).named_buffers()), **model.state_dict()}
    return ((name, tensor_bytes(tensor)) for name, tensor in sorted(held.items()) if isinstance(tensor, Tensor))


@torch.no_grad()
def _first_batch(model: Any, pairs: PromptPairs) -> dict[str, Any]:
    """Logits and the target's values on the first clean and corrupt prompts, as numbers."""
    rows = pairs[: rows_together(model, as_target(pairs.target), pairs.clean, pairs.clean_mask, _ROWS)]
    found: dict[str, Any] = {}
    target = as_target(rows.target)
    for name, *prompts in (("clean", rows.clean, rows.clean_mask), ("corrupt", rows.corrupt, rows.corrupt_mask)):
        tokens, mask = target.extend(model, *prompts)
        logits = Prompt(tokens, mask).call(model)
        seen = logits.flatten()
        if bool((mask == 0).any()) and logits.ndim == 3:
            seen = logits[mask.bool()].flatten()  # padding may hold anything
        found["dtype"] = str(logits.dtype).removeprefix("torch.")
        found[f"logits of {name} prompts"] = seen[:: max(1, len(seen) // _LOGITS)].double().tolist()
        if target.point is None:
            values = target.metric(model, tokens, mask)(logits if logits.ndim > 2 else logits.unsqueeze(1))
            found[f"values of the target on {name} prompts"] = values.double().reshape(-1).tolist()
    return found


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
