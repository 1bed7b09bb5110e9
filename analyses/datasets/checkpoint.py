"""A long run on disk, so that it can go on after an interruption: a folder with what run it is (JSON) and what it has so far (safetensors).

Every file is written beside its place and then renamed into it, so that a run killed at any moment leaves whole files or none. Each part
holds a checksum of its tensors, its name and its run, so that damaged and foreign files are known. No pickle: a checkpoint runs no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from lens_relevance import RelevanceError
from lens_relevance.whole_files import write_whole

NUMBERS = "numbers"  # of a run, which are compared up to rounding
_RUN = "run.json"
_CHECKSUM = "checksum"
# How far the same model on the same prompts may be from itself on another machine or with other threads, relative to the largest number.
_ROUNDING = {"float64": 1e-5, "float32": 1e-5}  # norms are often computed in float32 where all else is float64
_ROUNDING_OF_HALF = 2e-2


class Checkpoint:
    """The parts of one run under a folder, by name.

    run: what makes the results what they are, as JSON can hold it; see `analyses.datasets.fingerprint`.

    Raises RelevanceError where the folder holds another run, or something that is no checkpoint, or cannot be written to.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise RelevanceError(f"a checkpoint is a folder, and {folder} is a file; name another path")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Looked at in this order because another process may just be starting the same run: it writes run.json before anything else.
            strangers = [path.name for path in self.folder.iterdir() if not path.name.startswith((_RUN, ".run."))]
        except OSError as error:
            raise RelevanceError(f"{folder} cannot be used as a checkpoint: {error.strerror or error}") from error
        if (self.folder / _RUN).exists():
            self._check(run)
        elif strangers:
            raise RelevanceError(f"{folder} holds {strangers[0]} but no {_RUN}, so it is no checkpoint; name an empty or a new folder")
        else:
            content = json.dumps(run, indent=1)
            write_whole(self.folder / _RUN, lambda path: path.write_text(content, encoding="utf-8"))
        exact = {key: value for key, value in run.items() if key != NUMBERS}
        self._run = digest([("run", json.dumps(exact, sort_keys=True).encode())])

    def load(self, name: str) -> dict[str, Tensor] | None:
        """The tensors saved under a name; None if there are none yet."""
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors, noted = {key: file.get_tensor(key) for key in file.keys()}, (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, SafetensorError) as error:
            raise RelevanceError(f"{path} cannot be read ({error}); delete that file, and what it held is computed again") from error
        if noted != self._checksum(name, tensors):
            raise RelevanceError(
                f"{path} is damaged or of another run: its checksum does not fit. Delete that file, and what it held is computed again"
            )
        return tensors

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors under a name, in place of what was there."""
        whole = {key: value.contiguous().clone() for key, value in tensors.items()}
        content = safetensors.save(whole, metadata={_CHECKSUM: self._checksum(name, whole)})
        write_whole(self.folder / f"{name}.safetensors", lambda path: path.write_bytes(content))

    def remembered(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is saved under a name; where there is nothing yet, it is computed and saved."""
        found = self.load(name)
        if found is None:
            found = compute()
            self.save(name, found)
        return found

    def _checksum(self, name: str, tensors: dict[str, Tensor]) -> str:
        named = ((key, tensor_bytes(value)) for key, value in sorted(tensors.items()))
        return digest([("name", name.encode()), ("run", self._run.encode()), *named])

    def _check(self, run: dict[str, Any]) -> None:
        path = self.folder / _RUN
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RelevanceError(f"{path} cannot be read ({error}); delete the folder to start anew") from error
        if not isinstance(there, dict):
            raise RelevanceError(f"{path} describes no run; name another folder, or delete this one to start anew")
        here = json.loads(json.dumps(run))
        details = [
            f"{key}: {_short(there.get(key))} there, {_short(here.get(key))} here"
            for key in dict.fromkeys([*here, *there])
            if key != NUMBERS and there.get(key) != here.get(key)
        ]
        if not details:
            details = [f"{name} differ" for name in _differing(there.get(NUMBERS, {}), here.get(NUMBERS, {}))]
        if details:
            raise RelevanceError(
                f"{self.folder} is the checkpoint of another run ({'; '.join(details)}); name another path, or delete it to start anew"
            )


def _differing(there: Any, here: dict[str, Any]) -> list[str]:
    """Which lists of numbers differ by more than rounding."""
    if not isinstance(there, dict) or there.keys() != here.keys():
        return ["the numbers of the first batch"]
    allowed = _ROUNDING.get(str(here.get("dtype")), _ROUNDING_OF_HALF)
    return [name for name in here if name != "dtype" and not _close(there[name], here[name], allowed)]


def _close(there: Any, here: list[float], allowed: float) -> bool:
    if not isinstance(there, list) or len(there) != len(here) or not all(isinstance(number, int | float) for number in there):
        return False
    one, other = torch.tensor(there, dtype=torch.float64), torch.tensor(here, dtype=torch.float64)
    largest = float(other[other.isfinite()].abs().max()) if bool(other.isfinite().any()) else 0.0
    return torch.allclose(one, other, rtol=0, atol=allowed * largest, equal_nan=True)  # logits can be -inf by design


def saved_setting(folder: str | Path, name: str) -> Any:
    """A setting of the run whose checkpoint this folder is; None where there is none."""
    try:
        return json.loads((Path(folder) / _RUN).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):  # `Checkpoint` says what is wrong with it
        return None


def digest(named: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 of names and contents."""
    result = hashlib.sha256()
    for name, content in named:
        result.update(f"{name} {len(content)} ".encode() + content)
    return result.hexdigest()


def tensor_bytes(tensor: Tensor) -> bytes:
    """Type, shape and values; only type and shape of what is offloaded, whose values are not in memory."""
    described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    if tensor.is_meta:
        return described
    return described + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
