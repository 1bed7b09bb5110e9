"""The page of families and rulesets is what its command finds, and no family is missing from it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from analyses.benchmarks import families as module
from analyses.benchmarks.families import families, markdown, power_of_ten
from analyses.benchmarks.tiny_models import FAMILIES, MORE
from lens_relevance import RelevanceError, coverage, propagate, rulesets
from lens_relevance.rules import LNRule
from tests.precision import no_upcasts

ROOT = Path(__file__).resolve().parents[2]


def rows(text: str, heading: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the Markdown table whose first column has this heading."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    found = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        found[cells[0]] = cells[1:]
    return {name: cells for name, cells in found.items() if not name.startswith("---")}


@pytest.fixture(scope="module")
def page() -> str:
    """The page of measurements."""
    return (ROOT / "docs" / "measurements" / "families.md").read_text()


def test_no_family_is_missing_from_the_page(page: str) -> None:
    working, refused = rows(page, "family"), rows(page, "refused")
    assert working.pop("family") == [f"`{name}`" for name in rulesets()]
    assert refused.pop("refused") == ["reason"]
    assert [*working, *refused] == [family.title for family in FAMILIES.values()]
    assert "python -m analyses.benchmarks.families" in page


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_the_page_shows_what_a_fresh_run_finds(page: str, family: str) -> None:
    title = FAMILIES[family].title
    shown, fresh = rows(page, "family")[title], rows(markdown(families([family])), "family")[title]
    assert len(shown) == len(rulesets())
    for here, there in zip(shown, fresh, strict=True):
        if "–" in (here, there):
            assert here == there
        else:  # rounding errors differ from machine to machine, by a factor of ten at times
            assert abs(math.log10(float(here)) - math.log10(float(there))) < 2.5
            assert float(there) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_without_upcasts_to_float32_only_float64_rounding_is_left(family: str) -> None:
    """What the page says of the larger errors."""
    with no_upcasts():
        errors = families([family])[list(rulesets())]
    assert errors.max(axis=None) < 1e-12


def test_what_the_page_calls_refused_is_refused(page: str) -> None:
    shown, titles = rows(page, "refused"), {family.title: name for name, family in FAMILIES.items()}
    refused = {titles[title]: cells for title, cells in shown.items() if title in titles}
    assert refused
    for family in list(refused)[:2]:
        assert rows(markdown(families([family])), "refused")[FAMILIES[family].title] == refused[family]
        model = FAMILIES[family].build(torch.float32)
        with pytest.raises(RelevanceError) as refusal:
            propagate(model, torch.tensor([[1, 2, 3]]), lambda logits: logits[:, -1, 0], rules="attnlrp")
        assert refused[family][0].split(";")[0] in str(refusal.value)


@pytest.mark.parametrize("family", MORE)
def test_families_that_need_next_to_no_code(page: str, family: str) -> None:
    """The page names them; here two rulesets, `--more` prints all."""
    with no_upcasts():
        found = coverage(MORE[family].build(), ["attnlrp", "deeplift"])
    assert found.rulesets["works"].all() and found.rulesets["unexplained"].max() < 1e-9, found.rulesets
    assert found.sites["live"].all(), found.sites.loc[~found.sites["live"]]
    title = MORE[family].title
    assert f" {title}," in page.replace("\n", " ") or f" {title}." in page.replace("\n", " ")


class Refusing(LNRule):
    """A rule that cannot be had on a model."""

    def keep(self, *arguments: object) -> tuple[torch.Tensor, ...]:
        raise RelevanceError("not on | this model")


def test_a_ruleset_that_does_not_work_is_a_dash_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["lens_relevance.ruleset_tables"]._RULESETS, "broken", {"norm": Refusing()})
    table = families(["gpt2"], torch.float32)
    assert math.isnan(table["broken"][0]) and table["attnlrp"][0] < 1e-4
    text = markdown(table)
    assert rows(text, "family")["GPT-2"][-1] == "–"
    assert "GPT-2: not on \\| this model" in text


def test_powers_of_ten() -> None:
    assert [power_of_ten(error) for error in (2e-7, 1e-3, 0.0, 3e-20, float("nan"))] == ["1e-6", "1e-3", "1e-16", "1e-16", "–"]


def test_an_unknown_family() -> None:
    with pytest.raises(RelevanceError, match="unknown family 'gpt9'"):
        families(["gpt9"])


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    module.main(family=["gpt2"], dtype="float32")
    cells = rows(capsys.readouterr().out, "family")["GPT-2"]
    shown = [float(cell) for cell in cells if cell != "–"]
    assert len(cells) == len(rulesets()) == len(shown) + 1 and all(1e-12 < error < 1e-4 for error in shown)  # no norms on queries and keys
    assert "python -m analyses.benchmarks.families" in str(module.__doc__)
