"""Bars of what patching is expected to show: in the report, and as the page of a ranking."""

from __future__ import annotations

import pandas as pd

from analyses.components import Component, Node
from analyses.report.findings import Findings
from analyses.report.ranking_table import ranking_notes, ranking_table
from analyses.views import Page
from analyses.views.intervals import interval_view

EXPLAINED = (
    "Several estimates of the same effect are right under different conditions; where they differ, the effect lies somewhere around them. "
    "A bar is the interval in which the patched value is to be expected, a dot the score of `combined`, red where the bar is wide"
)


def interval_section(page: Page, findings: Findings) -> None:
    """What patching the heads was to be expected to show, and what it did."""
    page.heading("How far these numbers can be trusted")
    if findings.expected is None:
        page.prose("Intervals cannot be given on this model:")
        page.quote(findings.missing["intervals"])
        return
    table = findings.expected
    inside = int(((table["patching"] >= table["low"]) & (table["patching"] <= table["high"])).sum())
    page.prose(
        f"{EXPLAINED}, a ring what patching found. {inside} of the {len(table)} intervals hold it; {int((~table['reliable']).sum())} heads "
        "are flagged: patch these before you rely on their numbers."
    )
    page.view(interval_view(table, title="Heads: what patching was expected to show"))


def ranking_page(ranking: pd.DataFrame, kind: Component, *, title: str, words: str, command: str) -> Page:
    """A ranking with its intervals.

    Args:
        ranking: as `rank_heads` gives it.
        kind: what was ranked.
        words: over which pairs.
        command: what to type to get it again.
    """
    page = Page(title, words)
    page.table(ranking_table(ranking.head(20), kind.name, ranking.attrs["top_k"]), "The largest scores first.")
    for note in ranking_notes(ranking):
        page.prose(f"{note[0].upper()}{note[1:]}.")
    if "low" in ranking:
        measured = ", or what patching measured where the bar is a point" if "source" in ranking else ""
        page.heading("How far each score can be trusted")
        page.prose(f"{EXPLAINED}{measured}.")
        index = zip(ranking["layer"], ranking[kind.index], strict=True)
        names = [str(Node(kind.name, int(layer), **{kind.index: int(i)})) for layer, i in index]
        page.view(interval_view(ranking.assign(name=names)[["name", "score", "low", "high", "reliable"]], title=f"{title}: intervals"))
    page.details("All of them", ranking)
    page.facts({"To do it again": command})
    return page
