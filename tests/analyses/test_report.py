"""The report: its numbers are those of the tables, its page is one file that asks for nothing, and text in it stays text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import Ablation, score_items
from analyses.circuits.faithfulness import areas, faithfulness_frame
from analyses.embedded import load_embedded
from analyses.evaluation.comparison import compare
from analyses.evaluation.ranking import rank_heads
from analyses.patching import activation_patching
from analyses.report import Findings, find, from_pairs, from_prompt, from_task, report_page
from analyses.report.circuit import CircuitCheck, smallest_faithful
from analyses.report.comparison_page import comparison_page
from analyses.report.question import choose_reading
from analyses.report.summary import moves_in_words, odds, path_in_words, word_shares
from analyses.tasks import PromptPairs, ioi
from lens_relevance import RelevanceError, logit, logit_diff, propagate
from tests.analyses.browser import Browser, headless_chromium

PROMPT = "When Mary and John went to the store, John gave a drink to"
AGAINST = "When Mary and John went to the store, Mary gave a drink to"
ATTACK = "</script><img src=x onerror=alert(1)>\"'"


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return load_embedded()


@pytest.fixture(scope="module")
def found(model: TransformerBridge) -> Findings:
    return find(model, from_task(model, n=16), with_graph=True)


@pytest.fixture(scope="module")
def page(found: Findings) -> str:
    return report_page(found, "lens-relevance report").to_html()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_chromium() as opened:
        yield opened


def test_ioi_is_what_the_embedded_model_is_asked(model: TransformerBridge, found: Findings) -> None:
    pairs = ioi(model, n=16)
    assert found.question.title == "the ioi task" and torch.equal(found.question.pairs.clean, pairs.clean)
    assert (found.clean > 0).all() and found.predictions[0][1] > 0.5
    assert found.target == f"logit({found.predictions[0][0].strip()!r}) - logit({found.tokens[10].strip()!r})"
    assert [name.strip() for name in found.asked] == [found.predictions[0][0].strip(), found.tokens[10].strip()]


def test_the_page_asks_its_question_in_plain_words(found: Findings, page: str) -> None:
    right, wrong = (name.strip() for name in found.asked)
    assert f"<h1>Why “{right}” and not “{wrong}”?</h1>" in page and "The embedded model on the ioi task: 16 pairs" in page
    assert f"“{right}” 100%" in page and "“&#x27;" not in page  # quoted once
    times = float(f"{np.exp(found.value):.2g}")
    assert odds(found) == f"“{right}” is {times:,.0f} times as likely"
    assert odds(replace(found, value=-np.log(3.0))) == f"“{wrong}” is 3.0 times as likely"
    assert odds(replace(found, value=50.0)) == f"“{right}” is more than a billion times as likely"


@pytest.mark.usefixtures("pictures_as_dots")
def test_a_target_that_is_no_question_has_a_page_too(model: TransformerBridge, found: Findings) -> None:
    pairs = ioi(model, n=2)
    several = PromptPairs(pairs.clean, pairs.corrupt, logit([[1, 2], [3, 4]]))
    assert from_pairs(several, "a file").asked(model) == []
    without = replace(found, asked=[], target="mean of two", flow=None, graph=None, circuit=None)
    page = report_page(without, "lens-relevance report").to_html()
    assert "<h1>What decides the answer?</h1>" in page and "mean of two" in page and "in units of the target" in page


def test_the_circuits_are_those_of_the_examples(model: TransformerBridge, found: Findings) -> None:
    assert found.circuit is not None and not found.missing
    pairs = ioi(model, n=16)
    ablation, found_on = Ablation(model, pairs[slice(0, 4)], "edge"), Ablation(model, pairs[slice(4, 16)], "edge")
    assert found.circuit.n_edges == len(ablation.items) and (found.circuit.n_found, found.circuit.n_tried) == (12, 4)
    for method in ("deeplift", "random"):
        curve = found.circuit.curves.query("method == @method").set_index("k")["faithfulness"]
        counts = np.arange(0, len(ablation.items) + 1, 7)
        frame = faithfulness_frame(ablation, score_items(found_on, method), "absolute", counts=counts)
        np.testing.assert_allclose(curve.loc[counts], frame["faithfulness"], rtol=1e-3, atol=1e-4)
        assert curve.index.tolist() == list(range(len(ablation.items) + 1)) and curve.loc[len(ablation.items)] == pytest.approx(1, abs=1e-4)
        row = found.circuit.areas.set_index("method").loc[method]
        assert (row["cpr"], row["cmd"]) == pytest.approx(areas(curve.index.to_numpy() / len(ablation.items), curve.to_numpy()), rel=1e-4)
        kept = found.circuit.enough(method)
        assert (curve.loc[kept:] >= 0.9 - 1e-4).all() and curve.loc[kept - 1] < 0.9 + 1e-4
    assert found.circuit.enough("deeplift") < found.circuit.enough("random")


@pytest.mark.parametrize(
    ("faithfulness", "k"),
    [([0.0, 0.5, 0.95, 1.0], 2), ([0.0, 0.95, 0.5, 1.0], 3), ([0.95, 0.9, 1.0, 1.1], 0), ([0.0, 0.0, 0.0, 0.5], 3)],
)
def test_a_circuit_is_enough_from_where_the_curve_stays_high(faithfulness: list[float], k: int) -> None:
    assert smallest_faithful(pd.DataFrame({"k": range(4), "faithfulness": faithfulness})) == k


@pytest.mark.usefixtures("pictures_as_dots")
def test_where_no_part_of_the_edges_is_enough_that_is_said(found: Findings) -> None:
    rows = [
        ("deeplift", 1, 0.2),
        ("deeplift", 5, 0.875),
        ("deeplift", 10, 1.0),
        ("random", 1, 0.0),
        ("random", 5, -0.125),
        ("random", 10, 1.0),
    ]
    curves = pd.DataFrame(rows, columns=["method", "k", "faithfulness"]).assign(share=0.0, metric=0.0)
    areas = pd.DataFrame({"method": ["deeplift", "random"], "cmd": 0.5, "cpr": 0.5, "edges_for_90": [10, 10]})
    page = report_page(replace(found, circuit=CircuitCheck(curves, areas, 10, 12, 4, 3)), "lens-relevance report").to_html()
    assert "Only all of them" in page and "5 of 10 bring back 88% of the effect, taken at random −12%" in page
    assert "No part that was tried brings back nine tenths of it</strong>: the strongest 5 of 10 edges bring back 88%" in page


@pytest.mark.usefixtures("pictures_as_dots")
def test_what_a_model_does_not_allow_is_said(found: Findings) -> None:
    reasons = {"flow": "no live pattern <here>", "graph": "edges & all", "circuit": "no difference"}
    without = replace(found, flow=None, graph=None, circuit=None, missing=reasons)
    page = report_page(without, "lens-relevance report").to_html()
    assert all(html.escape(reason) in page for reason in reasons.values())
    assert "How many edges are enough?" not in page
    silent = report_page(replace(without, missing={}), "lens-relevance report").to_html()  # graph and circuits were not asked for
    assert "The whole way" not in silent and "strongest edges" not in silent


def test_the_heads_moves_are_told(found: Findings, page: str) -> None:
    assert found.flow is not None
    layer, index = (int(found.heads.iloc[0][name]) for name in ("layer", "index"))
    flow = found.flow[layer, index].double().numpy()
    query, key = np.unravel_index(np.abs(flow).argmax(), flow.shape)
    text = moves_in_words(found, layer, index)
    names = [f"“{found.tokens[i].strip()}” ({i})" for i in (key, query)]
    assert text.startswith(f"moves {flow[query, key]:+.2f} from {names[0]} to {names[1]}") and text.endswith(f"; {flow.sum():+.2f} in all")
    assert f"<dt>{found.heads.iloc[0]['head']}</dt><dd>{text}</dd>" in page
    assert moves_in_words(replace(found, flow=found.flow * 0), layer, index) == "moves nothing here"


def test_paths_are_read_from_left_to_right() -> None:
    tokens = ["<s>", " Ann", " gave"]
    path = "embed@1 -> L0.mlp.in@1 -> L0.mlp@1 -> L1H3.k@1 -> L1H3@2 -> L2H0.q@2 -> L2H0@2 -> logits@2"
    assert path_in_words(path, tokens) == ("“Ann” (1) → L0.mlp → L1H3 by its key, to “gave” (2) → L2H0 by its query → the answer")
    assert path_in_words("embed@0 -> logits@0", tokens) == "“<s>” (0) → the answer"


def test_heads_stand_beside_patching(model: TransformerBridge, found: Findings) -> None:
    pairs = ioi(model, n=16)
    ranking = rank_heads(model, pairs, found.rules)
    effects = activation_patching(model, pairs, "z", direction="mean").to_dataframe().set_index(["layer", "head"])["effect"]
    for row, expected in zip(found.heads.itertuples(), ranking.itertuples(), strict=True):
        assert (row.layer, row.index) == (expected.layer, expected.head) and row.head == f"L{row.layer}H{row.index}"
        assert row.relevance == pytest.approx(expected.score, rel=1e-5, abs=1e-6)
        assert row.patching == pytest.approx(effects[row.layer, row.index], rel=1e-4, abs=1e-5)
    assert found.stability == ranking.attrs["stability"] and found.stability in report_page(found, "").to_html()
    assert found.pearson == pytest.approx(np.corrcoef(found.heads["relevance"], found.heads["patching"])[0, 1])
    assert found.pearson > 0.97


def test_everything_adds_up_to_the_difference_of_the_runs(found: Findings) -> None:
    assert found.reference_value is not None
    explained = found.value - found.reference_value
    assert abs(explained) > 5
    against = found.words["deeplift: against the counterpart"]
    assert float(against.sum()) == pytest.approx(explained, rel=1e-4)
    assert found.residual.sum(0).tolist() == pytest.approx([explained] * found.residual.shape[1], rel=1e-4)
    assert found.account["unexplained"].abs().max() < 1e-4 * abs(explained)


def test_the_flow_of_a_head_adds_up_to_its_relevance(model: TransformerBridge, found: Findings) -> None:
    row = found.question.pairs[0]
    cache = propagate(model, row.clean, row.target, rules="deeplift", reference=row.corrupt)
    assert found.flow is not None
    torch.testing.assert_close(found.flow.sum(3).permute(2, 0, 1), cache.heads()[0], rtol=1e-4, atol=1e-4)
    assert float(found.flow.triu(1).abs().max()) == 0.0


def test_the_graph_is_that_of_the_example(found: Findings, page: str) -> None:
    assert found.graph is not None and 1 < len(found.graph.edges) <= 150
    assert found.graph.value == pytest.approx(found.explained, rel=1e-4)
    assert "The whole way" in page


def test_a_prompt_against_another(model: TransformerBridge) -> None:
    question = from_prompt(model, PROMPT, "Mary", wrong="John", against=AGAINST)
    found = find(model, question)
    assert found.n_pairs == 1 and found.prompt == PROMPT and found.counterpart == AGAINST
    shares = found.words["deeplift: against the counterpart"]
    changed = found.tokens.index(" John", 6)
    assert float(shares[changed]) == pytest.approx(found.explained, rel=1e-4)
    assert float(shares.abs().sum()) == pytest.approx(abs(float(shares[changed])), rel=1e-4)


def test_a_prompt_without_a_counterpart_is_explained_as_by_default(model: TransformerBridge) -> None:
    found = find(model, from_prompt(model, PROMPT, "Mary", wrong="John"))
    expected = propagate(model, PROMPT, logit_diff("Mary", "John"))
    assert expected.info["ruleset"] == "deeplift" and "mean_embedding" in expected.info["reference"]
    torch.testing.assert_close(found.words["deeplift: against the mean embedding"], expected.tokens()[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.residual, expected.residual()[0], rtol=1e-4, atol=1e-4)
    assert found.heads.iloc[0]["patching"] != 0 and found.n_pairs == 8


@pytest.mark.usefixtures("pictures_as_dots")
def test_rules_without_a_reference_explain_the_prompt_itself(model: TransformerBridge) -> None:
    found = find(model, from_prompt(model, PROMPT, "Mary", wrong="John", against=AGAINST), "attnlrp")
    expected = propagate(model, PROMPT, logit_diff("Mary", "John"), rules="attnlrp", audit=True)
    torch.testing.assert_close(found.words["attnlrp: the prompt on its own"], expected.tokens()[0])
    assert found.reference_value is None
    np.testing.assert_allclose(found.account["softmax"], expected.conservation()["softmax"], rtol=1e-4, atol=1e-6)
    page = report_page(found, "lens-relevance report").to_html()
    assert "softmax" in page and "norm_biases" in page


def test_without_an_answer_the_top_prediction_is_explained(model: TransformerBridge) -> None:
    question = from_prompt(model, PROMPT)
    cache = propagate(model, PROMPT, None, rules="attnlrp")
    assert question.target_in_words(model) == cache.info["target"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            dict(prompt=PROMPT, answer="Mary", wrong="John", against="Mary gave a drink to"),
            "15 tokens .* held against 6|a position must mean",
        ),
        (dict(prompt=PROMPT, answer="Mary went"), "2 tokens"),
        (dict(prompt=PROMPT, answer="Zaphod"), "not in the vocabulary"),
        (dict(prompt=""), "empty"),
    ],
)
def test_bad_prompts(model: TransformerBridge, arguments: dict[str, str], message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        from_prompt(model, **arguments)


def test_unknown_tasks_and_models_without_a_task(model: TransformerBridge, gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="unknown task 'chess'"):
        from_task(model, "chess")
    with pytest.raises(RelevanceError, match="--prompt"):
        from_task(gpt2)


def test_words_are_put_together() -> None:
    assert word_shares(["<s>", " g", "ir", "l", ",", " na", "med"], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [
        ("<s>", 0.0),
        ("girl", 6.0),
        (",", 4.0),
        ("named", 11.0),
    ]
    assert word_shares(["a", "b"], [1.0, 2.0]) == [("a", 1.0), ("b", 2.0)]


def cells(page: str, caption: str) -> list[list[str]]:
    """The rows of the table with that caption: the full number of each cell that has one, the text of the others."""
    table = next(part for part in page.split('<div class="lr-table">') if f"<caption>{caption}" in part).split("</table>")[0]
    rows = []
    for row in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1]):
        rows.append([number or html.unescape(text) for number, text in re.findall(r'<td[^>]*?(?:data-value="([^"]*)")?>(.*?)</td>', row)])
    return rows


def test_numbers_on_the_page_are_those_of_the_tables(found: Findings, page: str) -> None:
    for shown, row in zip(cells(page, "The heads that count most"), found.heads.head(10).itertuples(), strict=True):
        assert shown[0] == row.head
        assert float(shown[1]) == row.relevance and float(shown[3]) == row.patching
    for shown, account in zip(cells(page, "The account"), found.account.itertuples(), strict=True):
        assert shown[0] == account.layer and float(shown[2]) == account.relevance
    assert f"{found.pearson:.3f}" in page
    assert found.circuit is not None
    for shown, area in zip(cells(page, "CMD is the area"), found.circuit.areas.itertuples(), strict=True):
        assert shown[0].startswith(area.method)
        assert (float(shown[1]), float(shown[2]), int(shown[3])) == (area.cmd, area.cpr, area.edges_for_90)
    assert "tried on 4 pairs and found on 12 others" in page
    assert f"the strongest {found.circuit.enough('deeplift')} bring back nine tenths" in page
    curve = found.circuit.curves.query("method == 'deeplift'")
    points = page.split("Faithfulness of circuits")[-1].split("<tbody>")[1].split("</tbody>")[0]
    values = [float(number) for number in re.findall(r'<tr><td[^>]*>[^<]*</td><td[^>]*data-value="([^"]*)"', points)]
    assert values == curve["faithfulness"].tolist()


def test_the_page_is_one_file_with_nothing_to_fetch(page: str) -> None:
    assert len(page.encode()) < 3_000_000
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    for heading in (
        "What is explained",
        "Which words matter",
        "Which attention heads did the work",
        "Are the strongest edges enough?",
        "Does it add up?",
        "How this was computed",
    ):
        assert heading in page


@pytest.mark.usefixtures("pictures_as_dots")
def test_text_stays_text(model: TransformerBridge) -> None:
    """Prompts, counterparts, commands and file names are not markup."""
    pairs = ioi(model, n=2)
    found = find(model, from_pairs(PromptPairs(pairs.clean, pairs.corrupt, pairs.target), ATTACK))
    ends = {"k": [0, 1, 0, 1], "share": 0.0, "metric": 0.0, "faithfulness": [0.0, 1.0, 0.0, 1.0]}
    frame = pd.DataFrame({"method": [ATTACK, ATTACK, "random", "random"], **ends})
    areas = pd.DataFrame({"method": [ATTACK, "random"], "cmd": 0.5, "cpr": 0.5, "edges_for_90": 1})
    hostile = replace(
        found,
        prompt=ATTACK,
        counterpart=ATTACK + "?",
        target=ATTACK,
        asked=[ATTACK, ATTACK],
        predictions=[(ATTACK, 1.0)],
        tokens=[ATTACK] * len(found.tokens),
        rules=ATTACK,
        circuit=CircuitCheck(frame, areas, n_edges=1, n_found=0, n_tried=1, sizes=2),
        missing={"graph": ATTACK},
    )
    page = report_page(hostile, f"lens-relevance report --prompt {ATTACK}").to_html()
    assert "<img src=x" not in page and "&lt;img src=x" in page
    assert len(cells(page, "CMD is the area")) == 2 and html.unescape(cells(page, "CMD is the area")[0][0]) == ATTACK


@pytest.mark.slow
def test_the_page_in_a_browser(found: Findings, page: str, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    for width in (1280, 390):
        tab = browser.open(path, width=width)
        assert tab.problems() == []
        tab.fits(width)
        assert tab.run("document.querySelectorAll('.colored-tokens span').length") >= len(found.tokens)
        assert found.circuit is not None
        rows = "[...document.querySelectorAll('.lr-table')].find((e) => e.innerText.includes('CMD is')).querySelectorAll('td[data-value]')"
        shown = tab.run(f"[...{rows}].map((e) => +e.dataset.value)")
        assert shown == found.circuit.areas[["cmd", "cpr", "edges_for_90"]].to_numpy().ravel().tolist()
        tab.print_media()  # on paper, CircuitsVis's pictures give way to static ones
        assert tab.run("[...document.querySelectorAll('.lr-circuitsvis')].every((e) => getComputedStyle(e).display === 'none')")
        assert tab.run("[...document.querySelectorAll('.lr-on-paper')].every((e) => e.getBoundingClientRect().width > 100)")
        tab.close()


@pytest.mark.usefixtures("pictures_as_dots")
def test_the_comparison_page(model: TransformerBridge, tmp_path: Path) -> None:
    compared = compare(model, ioi(model, n=6), ["deeplift", "relp"], resamples=20)
    page = comparison_page(compared, "embedded", "logit(a) - logit(b)", words="6 pairs", command="lens-relevance compare").to_html()
    best = compared.table.set_index(["method", "component"])["pearson"]
    assert f"<td>{best['deeplift', 'heads']:.3f}\u00a0[" in page and "mean of denoising and noising" in page
    assert "MLP output: " in page and "<dd>logit(a) - logit(b)</dd>" in page
    assert repr(float(compared.scores["relp"].iloc[5])) in page


@pytest.mark.parametrize(
    ("typed", "likely", "taken", "said"),
    [
        ([1], {2, 9}, " Paris", "is read as ' Paris'"),  # only the token with the space is likely
        ([1], {1, 9}, "Paris", "is taken as typed"),
        ([1], {1, 2}, "Paris", "is taken as typed"),
        ([1], {9}, "Paris", "is taken as typed"),
        ([1, 3], {2}, " Paris", "is read as ' Paris'"),  # as typed it is no single token
        ([1, 3], {9}, "Paris", ""),  # the error about its pieces follows
    ],
)
def test_an_answer_without_its_space_is_the_token_that_the_model_expects(typed: list[int], likely: set[int], taken: str, said: str) -> None:
    text, words = choose_reading("Paris", typed, 2, likely=likely)
    assert text == taken and said in words and bool(words) == bool(said)
