"""A RelevanceCache as a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from safetensors.torch import save_file
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.tensor_files import read_tensors
from lens_relevance.whole_files import write_whole

if TYPE_CHECKING:
    from lens_relevance.cache import RelevanceCache

_GROUPS = ("activations", "coefficients", "reference_activations", "averaged", "masks", "arguments", "dictionaries")


def save_cache(cache: RelevanceCache, path: str | Path) -> None:
    """See `RelevanceCache.save`."""
    tensors = {"value": cache.value, "logits": cache.logits, "input_tokens": cache.input_tokens, "mask": cache.mask}
    for name in ("reference_value", "logit_positions"):
        if getattr(cache, name) is not None:
            tensors[name] = getattr(cache, name)
    for group in _GROUPS:
        tensors |= {f"{group}/{name}": tensor for name, tensor in getattr(cache, group).items()}
    meta = {"stacks": cache.stacks, "aliases": cache.aliases, "info": cache.info, "absent": cache.absent, "grid": cache.grid}
    meta["tensors"] = sorted(tensors)  # so that one that is missing is noticed
    account = "" if cache.account is None else cache.account.to_json(orient="split", double_precision=15)
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"lens_relevance": json.dumps(meta), "account": account}
    write_whole(path, lambda beside: save_file(contiguous, str(beside), metadata=metadata))


def load_cache(kind: type[RelevanceCache], path: str | Path, device: str) -> RelevanceCache:
    """See `RelevanceCache.load`."""

    def build(tensors: dict[str, Tensor], header: dict[str, str]) -> RelevanceCache:
        if "lens_relevance" not in header:
            raise RelevanceError(f"{path} was not written by RelevanceCache.save")
        return _from_parts(kind, tensors, header)

    return read_tensors(path, "a saved RelevanceCache", build, device=device)


def _from_parts(kind: type[RelevanceCache], tensors: dict[str, Tensor], header: dict[str, str]) -> RelevanceCache:
    meta = json.loads(header["lens_relevance"])
    if sorted(tensors) != meta.pop("tensors"):
        raise ValueError("it does not hold the tensors that were saved")
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    for name in [n for n in tensors if "/" in n]:
        group, _, point = name.partition("/")
        groups[group][point] = tensors.pop(name)
    account = None
    if header["account"]:
        split = json.loads(header["account"])
        account = pd.DataFrame(split["data"], columns=split["columns"])
    grid = tuple(meta.pop("grid") or ()) or None
    return kind(**groups, **tensors, **meta, account=account, grid=grid)  # type: ignore[arg-type]
