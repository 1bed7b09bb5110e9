"""README and guides: every Python block runs as printed, what is shown under a block is what it prints, and links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

import analyses.methods
import lens_relevance
from analyses.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUNNING = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
REAL, VARIABLE = '"google/gemma-3-270m"', "LENS_RELEVANCE_GEMMA"
NUMBER = r"[-+]?\d+(?:\.\d+)?"


def blocks(text: str) -> list[tuple[str, str | None]]:
    """Python blocks of a page, each with the text block that follows it, if one does."""
    found = re.findall(r"```python\n((?:(?!```).)*)```(?:\s*```text\n(.*?)```)?", text, flags=re.DOTALL)
    return [(code, shown or None) for code, shown in found]


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(NUMBER, text)]


@pytest.mark.parametrize("page", RUNNING, ids=[str(page.relative_to(ROOT)) for page in RUNNING])
def test_the_code_of_a_page_runs_as_printed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 270M is loaded where LENS_RELEVANCE_GEMMA names its folder; elsewhere the embedded model takes its place."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(app, "registered_commands", list(app.registered_commands))  # a page adds one
    names: dict[str, object] = {"__name__": "__main__"}
    folder = os.environ.get(VARIABLE)
    for code, shown in blocks(page.read_text(encoding="utf-8")):
        real = REAL in code or names.get("real")
        names["real"] = real
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code.replace(REAL, repr(folder) if folder else '"embedded"'), names)
        if shown is not None and (folder or not real):
            assert re.sub(NUMBER, "#", printed.getvalue()).split() == re.sub(NUMBER, "#", shown).split()
            assert numbers(printed.getvalue()) == pytest.approx(numbers(shown), abs=0.011)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_guide_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert page.name == "index.md" or f"({page.relative_to(ROOT / 'docs')})" in index, page


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_map_of_the_repository_leads_to_what_is_there() -> None:
    """Every file that CONTRIBUTING.md names exists, and so does every function that it says to call."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:lens_relevance|analyses|tests|docs)/[\w./]*)`", text)
    assert len(paths) > 20 and not [path for path in paths if not (ROOT / path).exists()]
    files = re.findall(r"`(?:rules/)?(\w+\.py)`", text)
    assert len(files) > 10 and not [
        name for name in files if not any(any((ROOT / package).rglob(name)) for package in ("lens_relevance", "analyses"))
    ]
    for name in re.findall(r"`(register_\w+|declare_sites)\(", text):
        assert hasattr(lens_relevance, name) or hasattr(analyses.methods, name), name
