"""Tensors of a dictionary's files (safetensors or npz, never pickle), each asked for by name, and an error for what is left over."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lens_relevance.errors import RelevanceError


class Weights:
    """The tensors of one file, in fp32 at least."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            tensors = _npz(path) if path.suffix == ".npz" else load_file(str(path))
        except (OSError, ValueError, KeyError, SafetensorError, BadZipFile) as error:
            raise RelevanceError(f"{path} cannot be read as {path.suffix[1:]} ({type(error).__name__}: {error})") from error
        self._tensors = {name: x if x.dtype == torch.float64 or not x.is_floating_point() else x.float() for name, x in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, n_dims: int) -> Tensor:
        """A tensor that has to be there, of so many dimensions."""
        tensor = self.take_any(name)
        if tensor is None:
            raise RelevanceError(f"{self.path} has no {name!r}; it has {', '.join(self._tensors) or 'nothing else'}")
        if tensor.ndim != n_dims:
            raise RelevanceError(
                f"{self.path}: {name!r} is {list(tensor.shape)}, where {n_dims} dimension(s) belong; cross-layer transcoders are read "
                "in circuit-tracer's form, from a folder of W_enc_0.safetensors, W_dec_0.safetensors, ..."
            )
        return tensor

    def take_any(self, name: str) -> Tensor | None:
        """A tensor, or None where there is none of the name."""
        return self._tensors.pop(name, None)

    def refuse_rest(self) -> None:
        """Raise RelevanceError where the file has a tensor that nothing was made of, so that the dictionary would be another one."""
        if self._tensors:
            raise RelevanceError(
                f"{self.path} has tensors that are not known: {', '.join(self._tensors)}. Is it of another format? Build a Dictionary(...) "
                "from its tensors yourself"
            )


def _npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
