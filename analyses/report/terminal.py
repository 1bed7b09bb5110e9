"""The same findings in the terminal."""

from __future__ import annotations

from typing import Literal

import pandas as pd
from pandas.api.types import is_numeric_dtype
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from analyses.evaluation.agreement import correlation_in_words
from analyses.report.findings import Findings
from analyses.report.page import account_sinks, head_table
from analyses.report.summary import number, predictions_in_words, unexplained
from analyses.views.palette import NEGATIVE, POSITIVE
from lens_relevance.shown_text import visible


def terminal_report(findings: Findings) -> Group:
    """Words, heads and the account, as rich renderables."""
    return Group(_question(findings), *(_words(findings, name) for name in findings.words), _heads(findings), _account(findings))


def show(findings: Findings, console: Console) -> None:
    """Print `terminal_report`."""
    console.print(terminal_report(findings))


def _question(findings: Findings) -> Text:
    text = Text(visible(findings.prompt), style="bold")
    if not findings.question.baseline:
        text.append(f"\nagainst: {visible(findings.counterpart)}", style="not bold")
    there = "the mean embedding" if findings.question.baseline else "the counterpart"
    compared = "" if findings.reference_value is None else f", on {there} {number(findings.reference_value)}"
    answer = visible(f"{findings.target} = {number(findings.value)}{compared}; next word: {predictions_in_words(findings)}")
    text.append(f"\n{answer}\n", style="not bold")
    return text


def _words(findings: Findings, name: str) -> RenderableType:
    relevance = findings.words[name].double().tolist()
    limit = max(map(abs, relevance)) or 1.0
    line = Text(f"Words, {name.split(': ', 1)[1]} (", style="bold")
    line.append("for", style=f"white on {POSITIVE}")
    line.append(" / ")
    line.append("against", style=f"white on {NEGATIVE}")
    line.append(f" the answer; sum {number(sum(relevance))})\n")
    for token, value in zip(findings.tokens, relevance, strict=True):
        line.append(visible(token.replace("\n", "↵")), style=_style(value / limit))
    line.append("\n")
    order = sorted(range(len(relevance)), key=lambda i: -abs(relevance[i]))[:5]
    most = ", ".join(f"{visible(findings.tokens[i].strip()) or '␣'} ({i}) {number(relevance[i])}" for i in order)
    line.append(f"most: {most}\n", style="not bold")
    for note in findings.notes(name):
        line.append(f"{visible(note)}\n", style="not bold")
    return line


def _style(share: float) -> str:
    """Background from pale to full; what hardly counts stays as it is."""
    if abs(share) < 0.08:
        return "not bold"
    full = POSITIVE if share > 0 else NEGATIVE
    channels = [int(full[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = [round(255 + (channel - 255) * min(abs(share), 1.0)) for channel in channels]
    return f"not bold {'white' if abs(share) > 0.5 else 'black'} on #{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"


def _heads(findings: Findings) -> Group:
    pearson, spearman = correlation_in_words(findings.pearson), correlation_in_words(findings.spearman)
    against = ", against random words" if findings.question.baseline else ""
    title = f"Heads{against}: relevance ({findings.rules}) beside activation patching, Pearson {pearson}, Spearman {spearman}"
    labels = [frame_table(findings.labels, "What they write")] if len(findings.labels.columns) > 1 else []
    return Group(frame_table(head_table(findings), title), *labels, Text(visible(findings.labels_note)))


def _account(findings: Findings) -> Group:
    sinks = account_sinks(findings)
    line = Text(f"\nUnexplained: at most {unexplained(findings):.1e} of {number(findings.explained)} at any layer.")
    return Group(frame_table(findings.account[["layer", "value", "relevance", *sinks, "unexplained"]], "Where the number went"), line)


def frame_table(frame: pd.DataFrame, title: str) -> Group:
    """A DataFrame as a rich table under its title; text from prompts is never read as markup."""
    table = Table()
    for name in frame.columns:
        side: Literal["left", "right"] = "right" if is_numeric_dtype(frame[name]) else "left"
        table.add_column(Text(visible(name)), justify=side, no_wrap=name == frame.columns[0])
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value)) for value in row))
    return Group(Text(visible(title), style="bold"), table)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return visible(value)
    if value != value:
        return "–"
    return f"{value:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.0e}"
