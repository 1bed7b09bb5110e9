"""Tables of docs/measurements: a command writes its own between two marks of a page, with what was measured and when.

    <!-- table: NAME -->
    command, settings, date, and the table
    <!-- end -->

What stands outside of the marks is written by hand and stays. tests/test_measured_again.py measures a cell of each page again that is
written so.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from lens_relevance import RelevanceError, __version__

_END = "<!-- end -->"


def markdown(frame: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    head = ["| " + " | ".join(frame.columns) + " |", "|---" * len(frame.columns) + "|"]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in frame.astype(str).itertuples(index=False))])


def write_table(page: Path, name: str, table: str, *, command: str, settings: str, measured: str | None = None) -> None:
    """Put a table in the place of the one of this name.

    Args:
        page: The .md file.
        table: In Markdown.
        command: What writes it, after `python -m`.
        settings: Model, task, number of pairs, seeds and what the numbers are, in words.
        measured: When, where the numbers come from a file of results; today if left out.

    Raises:
        RelevanceError: the page has no place for a table of this name.
    """
    text, begin = page.read_text(encoding="utf-8"), f"<!-- table: {name} -->"
    place = re.compile(re.escape(begin) + r".*?" + re.escape(_END), flags=re.DOTALL)
    if len(place.findall(text)) != 1:
        raise RelevanceError(f"{page} needs one pair of lines {begin!r} and {_END!r}, between which the table is written")
    settings = f"{settings}; {measured or f'{datetime.now(UTC):%Y-%m-%d}'}, version {__version__}."
    filled = f"{begin}\n`python -m {command}`\n\n{settings}\n\n{table}\n{_END}"
    page.write_text(place.sub(lambda _: filled, text), encoding="utf-8")


def read_table(page: Path, name: str) -> pd.DataFrame:
    """The table of this name as it stands in a page, its first column as index; cells are texts.

    Raises:
        RelevanceError: the page has no table of this name.
    """
    found = re.search(rf"<!-- table: {re.escape(name)} -->(.*?){_END}", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for line in found[1].splitlines() if line.startswith("|")] if found else []
    if len(lines) < 3:
        raise RelevanceError(f"{page} has no table {name!r}")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(cells[2:], columns=cells[0]).set_index(cells[0][0])
