"""Sentences beside relevance of tokens that is easily misread, in explain, the report and the table of token relevance."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from analyses.cli import app
from analyses.embedded import load_embedded
from analyses.report import find, from_prompt, report_page
from analyses.report.terminal import terminal_report
from analyses.report.token_explanation import explain_tokens
from analyses.report.token_notes import token_notes
from lens_relevance import logit
from lens_relevance.attention_methods import token_relevance
from tests.analyses.test_report import PROMPT

WORDS = ["<bos>", " Eiffel", " is"]


def test_tokens_that_carry_less_than_half_of_the_target() -> None:
    (note,) = token_notes(WORDS, [0.1, 1.0, 0.8], 4.0, rules="attnlrp")
    assert "carry 1.90 of 4.00, less than half: under attnlrp" in note and "mean embedding" in note and "--rules" in note
    assert token_notes(WORDS, [0.5, 1.0, 0.5], 4.0, rules="attnlrp") == []  # exactly half
    assert token_notes(WORDS, [-0.5, -1.0, -0.75], -4.0, rules="attnlrp") == []
    assert token_notes(WORDS, [0.1, 1.0, 0.8], None, rules="chefer") == []  # scores have no unit


def test_a_first_token_that_dominates() -> None:
    (note,) = token_notes(WORDS, [-3.0, 1.0, 0.8], None, rules="rollout")
    assert "“<bos>”, has 62% of all relevance" in note and "Compare the other tokens among themselves" in note and "mean embedding" in note
    assert token_notes(WORDS, [0.5, 0.25, 0.25], 1.0, rules="attnlrp") == []  # exactly half
    assert token_notes(WORDS[:1], [3.0], None, rules="rollout") == []  # there is no other


@pytest.mark.usefixtures("pictures_as_dots")
def test_explain_and_report_say_both(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_embedded()
    assert find(model, from_prompt(model, PROMPT)).notes("deeplift: against the mean embedding") == []
    found = find(model, from_prompt(model, PROMPT), "attnlrp")
    assert list(found.words) == ["attnlrp: the prompt on its own"]
    expected = found.words["attnlrp: the prompt on its own"].double()
    notes = found.notes("attnlrp: the prompt on its own")
    assert any("carry" in note for note in notes) == bool(expected.sum().abs() < abs(found.value) / 2)
    made_small = {name: torch.tensor([0.3, *[0.0] * (len(w) - 1)]) for name, w in found.words.items()}
    object.__setattr__(found, "words", made_small)
    html, shown = report_page(found, "lens-relevance report").to_html(), str(terminal_report(found).renderables[1])
    for text in (html, shown):
        assert "carry 0.30 of" in text and "has 100% of all relevance" in text


def test_the_table_of_token_relevance_says_who_dominates(gpt2, tokens: torch.Tensor) -> None:
    scores = token_relevance(gpt2, tokens[:1], logit(7), method="rollout").scores[0].abs()
    group = explain_tokens(gpt2, tokens[:1], logit(7), method="rollout", rules="gradient").renderables[1]
    said = any("The first token" in str(part) for part in group.renderables)
    assert said == bool(scores[0] > scores.sum() / 2)


def test_the_command_line_explains_a_single_prompt_as_propagate_does() -> None:
    result = CliRunner().invoke(app, ["explain", "--prompt", PROMPT], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert (
        "Words, against the mean embedding" in result.output
        and ", on the mean embedding −0.37; next word" in result.output
        and "Heads, against random words: rel" in result.output
    )
