"""Interval bars on the page of a ranking and in the report: the same numbers as in the tables, and a reason where there are none."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

from analyses.cli import app
from analyses.components import COMPONENTS
from analyses.evaluation.ranking import rank_heads
from analyses.report.findings import find
from analyses.report.intervals import interval_section, ranking_page
from analyses.report.question import from_task
from analyses.views import Page
from tests.analyses.test_ranking import random_pairs


def test_the_report_holds_intervals_against_patching(embedded: TransformerBridge) -> None:
    findings = find(embedded, from_task(embedded, "ioi", n=4))
    table = findings.expected
    assert table is not None and len(table) == 16
    ranking = rank_heads(embedded, findings.question.pairs)
    assert table["score"].tolist() == ranking["score"].tolist() and table["low"].tolist() == ranking["low"].tolist()
    patched = dict(zip(findings.heads["head"], findings.heads["patching"], strict=True))
    assert all(row.patching == patched[row.name] for row in table.itertuples(index=False))
    page = Page("title", "words")
    interval_section(page, findings)
    inside = int(((table["patching"] >= table["low"]) & (table["patching"] <= table["high"])).sum())
    html = page.to_html()
    assert f"{inside} of the 16 intervals hold it; {int((~table['reliable']).sum())} heads" in html and inside >= 12


@pytest.mark.usefixtures("pictures_as_dots")
def test_the_page_of_a_ranking_has_its_bars(gpt2: TransformerBridge) -> None:
    pairs = random_pairs(3)
    for method, bars in (("combined", True), ("relp", False)):
        ranking = rank_heads(gpt2, pairs, method)
        html = ranking_page(ranking, COMPONENTS["heads"], title=f"Heads by {method}", words="3 pairs.", command="again").to_html()
        assert ("intervals" in html and "in which the patched value is to be expected" in html) == bars
        assert html.count("L1H2") >= 1 and "again" in html


@pytest.mark.usefixtures("pictures_as_dots")
def test_rank_writes_a_page(tmp_path: Path) -> None:
    out = tmp_path / "heads.html"
    result = CliRunner().invoke(app, ["rank", "heads", "--n", "4", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "How far each score can be trusted" in out.read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["rank", "heads", "--n", "4", "--out", str(tmp_path / "heads.csv")]).exit_code == 0
    assert len(pd.read_csv(tmp_path / "heads.csv")) == 16
