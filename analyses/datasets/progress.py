"""Progress bars on standard error; none where that is no terminal (pipes, files, continuous integration)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def watched() -> bool:
    """Whether somebody sees standard error, so that a bar makes sense; of several processes, only the first one's.

    The stream itself is asked, not rich: that takes FORCE_COLOR, which build servers set, for a terminal.
    """
    return sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"


def progress_bar() -> Progress:
    """A bar that leaves nothing behind when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched())


@contextmanager
def spinner(words: str) -> Iterator[None]:
    """What is being waited for and for how long already, where it is not known how long it will take; removed when it ends."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not watched()) as progress:
        progress.add_task(words, total=None)
        yield
