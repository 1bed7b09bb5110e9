"""Files that results go to: checked before the work, written whole or not at all, and never over a file that somebody else wrote.

What this package writes holds `MARK` near its beginning (the generator of a page, the metadata of a picture). A table of comma-separated
values has no place for it, and is known by its columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from lens_relevance import RelevanceError
from lens_relevance.shown_text import visible
from lens_relevance.whole_files import check_writable, write_whole

MARK = "Made with lens_relevance"
_HEAD = 2**16  # bytes of a file in which the mark is looked for
_FORMULA = ("=", "+", "-", "@")


class OutputFile:
    """A file that will be written when the work is done.

    Args:
        path: where to. Its folder has to exist.
        force: overwrite whatever is there.
        columns: those by which a table of ours is known, in their order; it may have more after them.

    Raises:
        RelevanceError: nothing can be written there, or what is there was not written by this package.
    """

    def __init__(self, path: str | Path, *, force: bool = False, columns: Sequence[str] = ()) -> None:
        self.path, self.force, self.columns = Path(path), force, list(columns)
        self._check()

    def _check(self) -> None:
        check_writable(self.path)
        if self.path.is_file() and not self.force and not _is_ours(self.path, self.columns):
            raise RelevanceError(f"{self.path} exists and was not written by lens_relevance; name another file, or add --force")

    def write(self, writer: Callable[[Path], object]) -> None:
        """Have the file written by `writer`, which is given the path to write to.

        Raises:
            RelevanceError: it cannot be written, or somebody else wrote there in the meantime; what was there before is as it was.
        """
        self._check()
        write_whole(self.path, writer)

    def write_table(self, frame: pd.DataFrame) -> None:
        """Write a DataFrame as comma-separated values; see `table_csv`."""
        self.write(lambda path: path.write_text(table_csv(frame), encoding="utf-8"))


def table_csv(frame: pd.DataFrame) -> str:
    """A DataFrame as comma-separated values, numbers with all their digits.

    A text that begins like a formula (= + - @) gets an apostrophe in front, so that a spreadsheet shows it and does not compute it;
    control characters are shown escaped.
    """
    shown = frame.copy()
    for name in shown.columns:
        if not pd.api.types.is_numeric_dtype(shown[name]):
            shown[name] = shown[name].map(lambda value: _cell(value) if isinstance(value, str) else value)
    return shown.rename(columns=_cell).to_csv(index=False)


def _cell(text: str) -> str:
    shown = visible(text, keep="")
    return f"'{shown}" if shown.startswith(_FORMULA) else shown


def _is_ours(path: Path, columns: list[str]) -> bool:
    """Whether a file holds our mark, or is a table that begins with these columns. An empty file may be overwritten."""
    if os.stat(path).st_size == 0:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise RelevanceError(f"{path} cannot be read, so it is not known who wrote it: {error.strerror or error}") from error
    first = head.split(b"\n", 1)[0].decode("utf-8", errors="replace").rstrip("\r").split(",")
    return MARK.encode() in head or (bool(columns) and first[: len(columns)] == columns)
