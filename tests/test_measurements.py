"""Tables of docs/measurements are what their commands find, and figures that are quoted stand on the pages that are cited."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analyses.benchmarks.tables import markdown, read_table, write_table
from lens_relevance import RelevanceError

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "measurements"
QUOTING = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
# Pages whose prose says nothing that was measured apart from the tables.
OWN_FIGURES = ("flow_routes.md", "gemma_ioi.md", "heads_against_patching.md", "mutations.md")
MARKED = re.compile(r"<!-- table: .*?<!-- end -->", flags=re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d*\.\d+(?![\w.]*\d)")

# Pages that one command writes whole, and those that tests of their own compare with a fresh run. On all others tables stand between marks.
WHOLE = {
    "attacks.md": "tests.attacks",
    "estimates.md": "analyses.benchmarks.estimates",
    "evaluation.md": "analyses.benchmarks.evaluation",
    "families.md": "analyses.benchmarks.families",
    "knowledge_neurons.md": "analyses.benchmarks.knowledge_neurons",
    "known_roles.md": "analyses.known_roles",
    "long_contexts.md": "analyses.benchmarks.long_contexts",
    "released.md": "analyses.benchmarks.families --released",
    "single_prompts.md": "analyses.benchmarks.single_prompts_table",
}


def test_every_table_comes_from_a_command() -> None:
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if command := WHOLE.get(page.name):
            assert command in text, (page.name, command)
            continue
        outside = MARKED.sub("", text)
        assert not re.search(r"^\|.*\|$", outside, flags=re.MULTILINE), f"{page.name} has a table that no command writes"
        assert "<!-- table: " in text and not re.search(r"<!-- table: [^>]*-->\s*<!-- end -->", text), f"{page.name} has an empty place"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d*\.?\d+", text.replace("−", "-"))]


def quoted(text: str) -> list[str]:
    """Numbers with a fraction, without code, links and the numbers of papers."""
    return [n.replace("−", "-") for n in NUMBER.findall(re.sub(r"arXiv [\d.]+|\]\([^)]*\)|`[^`]*`", "", text))]


def stands_in(number: str, page: str) -> bool:
    """Whether a page has a number that is this one, rounded to as many digits."""
    digits = len(number.split(".")[1])
    known = [n.replace("−", "-") for n in NUMBER.findall(page)]
    return any(abs(round(float(n), digits) - float(number)) < 1e-9 for n in known if len(n.split(".")[1]) >= digits)


def not_on_the_pages_cited(text: str, folder: Path) -> list[str]:
    """Numbers of sections (`## ...`) that cite pages of measurements, and are on none of the pages that their section cites."""
    missing = []
    for section in re.split(r"\n(?=## )", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        cited = {target for target in re.findall(r"\]\(([^)#]+\.md)", section) if "measurements/" in target or "results.md" in target}
        pages = "\n".join((folder / target).read_text(encoding="utf-8") for target in sorted(cited))
        missing += [number for number in quoted(section) if cited and not stands_in(number, pages)]
    return missing


@pytest.mark.parametrize("name", OWN_FIGURES)
def test_figures_in_the_prose_of_a_page_stand_in_its_tables(name: str) -> None:
    page = (PAGES / name).read_text(encoding="utf-8")
    prose, tables = MARKED.sub("", page), "\n".join(MARKED.findall(page))
    assert not [number for number in quoted(re.sub(r"^    .*$", "", prose, flags=re.MULTILINE)) if not stands_in(number, tables)]


@pytest.mark.parametrize("page", QUOTING, ids=[page.name for page in QUOTING])
def test_figures_that_are_quoted_stand_on_the_pages_cited(page: Path) -> None:
    assert not not_on_the_pages_cited(page.read_text(encoding="utf-8"), page.parent)


def test_the_readme_s_table_is_that_of_gemma() -> None:
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    page = read_table(PAGES / "gemma_ioi.md", "gemma3-270m, ioi, resid,attn,mlp,heads").reset_index().set_index(["component", "method"])
    compared_there = 0
    for method, cells in lines:
        for component, cell in zip(("resid", "attn", "mlp", "heads"), cells.split(" | "), strict=False):
            if ("resid", f"`{method}`") in page.index:
                row = page.loc[(component, f"`{method}`")]
                there = [numbers(row[column])[0] for column in ("Pearson (95 %)", "Spearman (95 %)")]
                assert numbers(cell) == pytest.approx(there, abs=0.0006), (method, component)
                compared_there += 1
    assert compared_there == 32


def test_what_stands_in_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: one -->\nold | 1 |\n<!-- end -->\nbetween\n<!-- table: two -->\n<!-- end -->\nafter\n", encoding="utf-8"
    )
    with pytest.raises(RelevanceError, match="has no table"):
        read_table(page, "two")
    table = "| a | b |\n|---|---|\n| x | 0.5 |"
    write_table(page, "two", table, command="analyses.benchmarks.two --n 1", settings="of nothing")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table: one -->\nold | 1 |\n<!-- end -->\nbetween\n") and text.endswith("<!-- end -->\nafter\n")
    assert "python -m analyses.benchmarks.two --n 1" in text and "of nothing; 20" in text
    assert read_table(page, "two").loc["x", "b"] == "0.5" and markdown(read_table(page, "two").reset_index()) == table
    with pytest.raises(RelevanceError, match="needs one pair of lines"):
        write_table(page, "three", table, command="", settings="")


def test_a_figure_that_no_page_has_is_found(tmp_path: Path) -> None:
    (tmp_path / "measurements").mkdir()
    (tmp_path / "measurements" / "a.md").write_text("| x | .981 | -0.4567 |", encoding="utf-8")
    section = "## One\n[here](measurements/a.md): .98, −.457, `0.1`, arXiv 2402.05602, and .983.\n## Two\nwithout a page .123"
    assert not_on_the_pages_cited(section, tmp_path) == [".983"]
