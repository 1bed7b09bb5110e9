"""Prompt pairs on disk: one safetensors file, the target described as JSON in its metadata. No pickle, so a file runs no code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from analyses.tasks.later_years import LaterYears
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import AnyTarget, Kind, Target, TokenTarget, describe
from lens_relevance.tensor_files import read_tensors
from lens_relevance.whole_files import write_whole

_FORMAT = "lens_relevance prompt pairs 1"
TENSORS = ("clean", "corrupt", "clean_mask", "corrupt_mask")


def save(path: Path, tensors: dict[str, Tensor], target: AnyTarget, *, dropped: Sequence[str]) -> None:
    """Writes the parts of `PromptPairs`; a RelevanceError names a target that cannot be written."""
    if isinstance(target, TokenTarget):
        described = {"kind": target.kind, "answer": _plain(target.answer), "wrong": _plain(target.wrong), "position": target.position}
    elif isinstance(target, LaterYears):
        described = {"kind": "later_years"}
        tensors = tensors | {"years": target.years, "later": target.later}
    else:
        raise RelevanceError(
            f"prompt pairs with the target {describe(target)!r} cannot be saved: it is code; "
            "only logit, logit_diff, log_prob and the targets of the tasks are data"
        )
    metadata = {"format": _FORMAT, "target": json.dumps(described), "dropped": json.dumps(list(dropped))}
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    write_whole(path, lambda beside: save_file(copies, beside, metadata=metadata))


def load(path: Path) -> dict[str, Any]:
    """The arguments of `PromptPairs` from a file that `save` wrote."""

    def build(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Any]:
        if metadata.get("format") != _FORMAT:
            raise RelevanceError(f"{path} was not written by PromptPairs.save; text goes through PromptPairs.from_file")
        parts: dict[str, Any] = {name: tensors[name] for name in TENSORS}
        dropped = json.loads(metadata["dropped"])
        if not isinstance(dropped, list):
            raise TypeError(f"dropped is {dropped!r}")
        return parts | {"target": _target(json.loads(metadata["target"]), tensors), "dropped": tuple(dropped)}

    return read_tensors(path, "saved prompt pairs", build)


def _target(described: dict[str, Any], tensors: dict[str, Tensor]) -> Target:
    kind = described["kind"]
    if kind == "later_years":
        return LaterYears(tensors["years"], tensors["later"])
    if kind not in get_args(Kind):
        raise ValueError(f"there is no target {kind!r}")
    return TokenTarget(kind, _tokens(described["answer"]), _tokens(described["wrong"]), described["position"])


def _plain(tokens: Any) -> Any:
    """Tokens of a target (str, int, None, a tensor or a nest of sequences of them) as JSON can hold them."""
    if isinstance(tokens, Tensor):
        return tokens.tolist()
    return [_plain(token) for token in tokens] if isinstance(tokens, list | tuple) else tokens


def _tokens(plain: Any) -> Any:
    return torch.tensor(plain) if isinstance(plain, list) and all(isinstance(token, int) for token in plain) else plain
