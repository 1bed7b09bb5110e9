"""JSON from elsewhere, read with care: its size, its encoding, names that occur twice, numbers that are none."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lens_relevance.errors import RelevanceError
from lens_relevance.shown_text import visible

LARGEST = 2**30
"""Bytes. A circuit of a model with 1,000 heads takes a tenth of it."""


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        what: what the file should be, for errors: "a MIB circuit".

    Raises:
        RelevanceError: the file cannot be read, is larger than `LARGEST`, or is not one JSON object with every name once.
    """
    name = visible(str(path))
    try:
        size = Path(path).stat().st_size
        if size > LARGEST:
            raise RelevanceError(f"{name} has {size:,} bytes, more than the {LARGEST:,} that are read as {what}")
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else visible(str(error))
        raise RelevanceError(f"{name} cannot be read as {what} ({reason})") from error
    if not isinstance(content, dict):
        raise RelevanceError(f"{name} cannot be read as {what}: it holds a {type(content).__name__}, not an object")
    return content


def only(part: Any, where: str, *, needed: tuple[str, ...], allowed: tuple[str, ...] = ()) -> dict[str, Any]:
    """A part of a file that has to be an object with these names and no others.

    Raises:
        RelevanceError: it is not, or a name is missing or unknown.
    """
    if not isinstance(part, dict):
        raise RelevanceError(f"{where} is not an object but {visible(repr(part))[:60]}")
    if missing := [name for name in needed if name not in part]:
        raise RelevanceError(f"{where} lacks {missing[0]!r}")
    known = {*needed, *allowed}
    if unknown := [name for name in part if name not in known]:
        listed = ", ".join((*needed, *allowed)[:20])
        raise RelevanceError(f"{where} has the unknown field {visible(repr(unknown[0]))[:60]}; known are {listed}")
    return part


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice!r} occurs twice in one object")
    return result
