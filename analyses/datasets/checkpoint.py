"""A long run on disk, so that it can go on after an interruption: a folder with what run it is (JSON) and what it has so far (safetensors).

Every file is written beside its place and then renamed into it, so that a run killed at any moment leaves whole files or none. No pickle: a
checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, __version__

_RUN = "run.json"


class Checkpoint:
    """The parts of one run under a folder, by name.

    run: what makes the results what they are, as JSON can hold it; see `fingerprint`.

    Raises RelevanceError where the folder holds another run, or something that is no checkpoint.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise RelevanceError(f"a checkpoint is a folder, and {folder} is a file; name another path")
        self.folder.mkdir(parents=True, exist_ok=True)
        # Looked at in this order because another process may just be starting the same run: it writes run.json before anything else.
        strangers = [path.name for path in self.folder.iterdir() if _RUN not in path.name]
        if (self.folder / _RUN).exists():
            self._check(run)
        elif strangers:
            raise RelevanceError(f"{folder} holds {strangers[0]} but no {_RUN}, so it is no checkpoint; name an empty or a new folder")
        else:
            self._write(_RUN, json.dumps(run, indent=1).encode())

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors saved under a name; None if there are none yet."""
        path = self.folder / f"{name}.safetensors"
        try:
            return safetensors.load_file(path) if path.exists() else None
        except (OSError, SafetensorError) as error:
            raise RelevanceError(f"{path} cannot be read ({error}); delete the folder to start anew") from error

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors under a name, in place of what was there."""
        self._write(f"{name}.safetensors", safetensors.save({key: value.contiguous().clone() for key, value in tensors.items()}))

    def _check(self, run: dict[str, Any]) -> None:
        try:
            there = json.loads((self.folder / _RUN).read_text())
        except (OSError, ValueError) as error:
            raise RelevanceError(f"{self.folder / _RUN} cannot be read ({error}); delete the folder to start anew") from error
        differing = [key for key in dict.fromkeys([*run, *there]) if there.get(key) != json.loads(json.dumps(run.get(key)))]
        if differing:
            details = "; ".join(f"{key}: {_short(there.get(key))} there, {_short(run.get(key))} here" for key in differing)
            raise RelevanceError(
                f"{self.folder} is the checkpoint of another run ({details}); name another path, or delete it to start anew"
            )

    def _write(self, name: str, content: bytes) -> None:
        # The process id keeps processes that share the folder out of each other's unfinished files.
        unfinished = self.folder / f".{name}.{os.getpid()}.tmp"
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.folder / name)


def fingerprint(model: Any, pairs: PromptPairs, **settings: Any) -> dict[str, Any]:
    """What a run is known by: hashes of the model's weights and of the pairs, this version, and the settings.

    A function as target is known by its name alone: what it does cannot be read off.
    """
    # a generator: copies of all weights at once might not fit
    weights = ((name, _bytes(weight)) for name, weight in sorted(model.state_dict().items()) if isinstance(weight, Tensor))
    hooked = sorted(name for name, point in model.hook_dict.items() if point.has_hooks())
    tokens = [(name, _bytes(getattr(pairs, name))) for name in ("clean", "corrupt", "clean_mask", "corrupt_mask")]
    return {
        "model": _digest(weights),
        "hooks on the model": hooked,
        "pairs": _digest([*tokens, ("target", json.dumps(_plain(pairs.target)).encode())]),
        "lens_relevance": __version__,
        **settings,
    }


def _digest(named: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, content in named:
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    """Type, shape and values; only type and shape of what is offloaded, whose values are not in memory."""
    described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    if tensor.is_meta:
        return described
    return described + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


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


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
