"""Files that results go to: looked at before the work, written whole or not at all, never over what somebody else wrote.

What this package writes bears `MARK` near its beginning (a generator in HTML and JSON, metadata in pictures); a table of comma-separated
values has no place for it and is known by its columns.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from lens_relevance import RelevanceError

MARK = "Made with lens_relevance"
_HEAD = 2**16  # bytes of a file in which the mark is looked for
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class OutputFile:
    """A file that will be written when the work is done.

    Args:
        path: where to. Its folder has to exist.
        force: overwrite whatever is there.
        columns: of the table, where a table is written.

    Raises:
        RelevanceError: nothing can be written there, or what is there was not written by this package.
    """

    def __init__(self, path: str | Path, *, force: bool = False, columns: Sequence[str] = ()) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise RelevanceError(f"there is no folder {self.path.parent} to write {self.path.name} to")
        if self.path.is_dir():
            raise RelevanceError(f"{path} is a folder; name a file in it")
        self._is_special = self.path.exists() and not self.path.is_file()  # /dev/stdout: not replaced, but written to
        if self._is_special:
            return
        if self.path.exists() and not force and not _is_ours(self.path, columns):
            raise RelevanceError(f"{path} is there already and was not written by lens_relevance; name another file, or say --force")
        if self.path.exists() and not os.access(self.path, os.W_OK):
            raise RelevanceError(f"{path} may not be written to")
        write_whole(self.path, lambda beside: beside.write_bytes(b""), keep=False)

    def write(self, writer: Callable[[Path], object]) -> None:
        """Have the file written by `writer`, which is given the path to write to.

        Raises:
            RelevanceError: it cannot be written; what was there before is as it was.
        """
        if self._is_special:
            writer(self.path)
        else:
            write_whole(self.path, writer)

    def write_table(self, frame: pd.DataFrame) -> None:
        """Write a DataFrame as comma-separated values; see `table_csv`."""
        self.write(lambda path: path.write_text(table_csv(frame), encoding="utf-8"))


def write_whole(path: Path, writer: Callable[[Path], object], *, keep: bool = True) -> None:
    """Have a file written beside its place, and put it there when it is complete: it is whole or as it was, whatever happens.

    keep: False to try whether it could be written, and leave nothing.

    Raises:
        RelevanceError: it cannot be written.
    """
    place = path.resolve()  # a link stays a link
    beside = None
    try:
        # With the ending that writers choose the format by, and a name that no other process has.
        handle, name = tempfile.mkstemp(prefix=f".{place.stem}.", suffix=f".tmp{place.suffix}", dir=place.parent)
        beside = Path(name)
        os.close(handle)
        writer(beside)
        if not keep:
            return
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.chmod(place.stat().st_mode if place.exists() else 0o666 & ~_umask())
        os.replace(beside, place)
        beside = None
    except OSError as error:
        raise RelevanceError(f"{path} cannot be written: {error.strerror or error}. Nothing was changed there") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def _umask() -> int:
    """What a new file is not allowed; it can only be read by setting it."""
    found = os.umask(0)
    os.umask(found)
    return found


def _is_ours(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file bears our mark, or is a table with these columns; an empty file is nobody's."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise RelevanceError(f"{path} cannot be read, so it is not known whose it is: {error.strerror or error}") from error
    if not head or MARK.encode() in head:
        return True
    first = head.split(b"\n", 1)[0].decode("utf-8", errors="replace").rstrip("\r")
    return bool(columns) and first.split(",") == list(columns)


def table_csv(frame: pd.DataFrame) -> str:
    """A DataFrame as comma-separated values, numbers with all their digits.

    A text that begins like a formula (= + - @) gets an apostrophe in front, so that a spreadsheet shows it and does not compute it.
    """
    shown = frame.copy()
    for name in shown.columns:
        if not pd.api.types.is_numeric_dtype(shown[name]):
            shown[name] = shown[name].map(lambda value: f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value)
    return shown.to_csv(index=False, quoting=csv.QUOTE_MINIMAL)
