"""Families with the settings of released models are right or refused: the page is what its command finds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from analyses.benchmarks.families import markdown, released
from analyses.benchmarks.released import RELEASED, Released
from analyses.benchmarks.tiny_models import FAMILIES, MORE
from lens_relevance import rulesets
from tests.analyses.test_families_table import rows
from tests.precision import no_upcasts


def _title(setting: Released) -> str:
    return f"{(FAMILIES | MORE)[setting.family].title}: {setting.models}"


@pytest.fixture(scope="module")
def page() -> str:
    """The page of measurements."""
    return (Path(__file__).resolve().parents[2] / "docs" / "measurements" / "released.md").read_text()


def test_every_family_and_setting_is_on_the_page_right_or_refused(page: str) -> None:
    working, refused = rows(page, "family"), rows(page, "refused")
    assert working.pop("family") == [f"`{name}`" for name in rulesets()]
    assert refused.pop("refused") == ["reason"] and all(reason for (reason,) in refused.values())
    assert {*working, *refused} == {_title(setting) for setting in RELEASED} and not set(working) & set(refused)
    assert {setting.family for setting in RELEASED} == {*FAMILIES, *MORE}
    assert max(float(cell) for cells in working.values() for cell in cells if cell != "–") <= 1e-3


@pytest.mark.parametrize("models", ["Qwen2.5-0.5B", "StableLM 2 1.6B"])
def test_the_largest_cells_are_float32_relative_to_a_small_target(models: str) -> None:
    setting = next(each for each in RELEASED if each.models == models)
    with no_upcasts():
        table = released([setting], torch.float64)
    assert table[list(rulesets())].max(axis=None) < 1e-9


@pytest.mark.parametrize("setting", RELEASED[::11], ids=_title)
def test_the_page_shows_what_a_fresh_run_finds(setting: Released, page: str) -> None:
    fresh, title = markdown(released([setting])), _title(setting)
    if title in rows(page, "refused"):
        assert rows(fresh, "refused")[title] == rows(page, "refused")[title]
        return
    for here, there in zip(rows(page, "family")[title], rows(fresh, "family")[title], strict=True):
        assert (here == "–") == (there == "–")
        assert here == "–" or abs(math.log10(float(here)) - math.log10(float(there))) < 2.5
