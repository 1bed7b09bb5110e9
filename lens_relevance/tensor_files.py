"""Safetensors files of this package's own, read with care: whatever is wrong with one is a RelevanceError that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.shown_text import visible

_Content = TypeVar("_Content")


def read_tensors(
    path: str | Path, what: str, build: Callable[[dict[str, Tensor], dict[str, str]], _Content], *, device: str = "cpu"
) -> _Content:
    """What `build` makes of the tensors and the metadata of a file.

    Args:
        path: the file.
        what: what it should be, for errors: "an atlas".
        build: may raise what a damaged file leads to (ValueError, KeyError, TypeError, AttributeError).
        device: where the tensors go.

    Raises:
        RelevanceError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        return build(tensors, metadata)
    except RelevanceError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise RelevanceError(visible(f"{path} cannot be read as {what} ({reason})")) from error
