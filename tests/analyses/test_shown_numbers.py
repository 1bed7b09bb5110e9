"""The numbers, scales and directions that pictures, the report and the terminal show are those they were given."""

from __future__ import annotations

import html
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from rich.text import Text
from transformer_lens.model_bridge import TransformerBridge

from analyses import views
from analyses.patching import activation_patching
from analyses.report import Findings, find, from_prompt, from_task
from analyses.report.page import head_table
from analyses.report.question import Question
from analyses.report.summary import in_short, moves_in_words, odds, unexplained
from analyses.report.terminal import terminal_report
from analyses.tasks import PromptPairs
from analyses.views import Page
from analyses.views.heatmap import HeatMap, heat_map_view
from analyses.views.markup import rounded
from analyses.views.palette import POSITIVE
from lens_relevance import logit_diff, mean_embedding, propagate
from tests.analyses.test_views import props_of

TOKENS = ["<s>", " Mary", " and"]


def texts(figure: Figure) -> set[str]:
    """What is written into a picture."""
    return {text.get_text() for axis in figure.axes for text in axis.texts}


FLOW = np.zeros((1, 2, 3, 3))
FLOW[0, 0, 2, 1], FLOW[0, 1, 1, 0] = -2.5, 1.0
MAPS = [
    HeatMap("pale", np.ones((2, 1)), ["0", "1"], ["0"], "layer", "head", 1.0),
    HeatMap("strong", np.array([[2.5], [-1.0]]), ["0", "1"], ["0"], "layer", "head", 2.5),
]
PICTURES = {
    "heads": lambda: views.head_heatmap_view(np.array([[0.5, -2.5], [1.0, 0.0]])),
    "several maps": lambda: heat_map_view("t", MAPS),
    "layers": lambda: views.layer_view(TOKENS, np.array([[0.5, -2.5], [1.0, 0.0], [0.1, 0.2]])),
    "tokens": lambda: views.token_view(TOKENS, np.array([0.5, -2.5, 1.0])),
    "several values": lambda: views.token_multi_view(TOKENS, {"one": np.array([0.5, -2.5, 1.0])}),
    "flow of heads": lambda: views.head_flow_view(TOKENS, FLOW),
    "neurons": lambda: views.neuron_view(TOKENS, {0: np.array([[0.5, 0.0], [-2.5, 0.0], [1.0, 0.0]])}),
}


@pytest.mark.parametrize("kind", list(PICTURES))
def test_the_printed_scale_ends_at_the_largest_magnitude(kind: str) -> None:
    assert {"−2.50 against", "for +2.50"} <= texts(PICTURES[kind]().figure())


def test_the_scale_of_a_heat_map_is_that_of_its_colours() -> None:
    view = views.head_heatmap_view(np.array([[0.5, -2.5], [1.0, 0.0]]))
    assert props_of(view)["maps"][0]["limit"] == 2.5
    figure = view.figure()
    figure.draw_without_rendering()
    axis = figure.axes[0]
    mesh = axis.collections[0]
    assert mesh.get_clim() == (-2.5, 2.5)
    weak_for, against, strong_for, nothing = mesh.to_rgba(mesh.get_array().ravel())
    assert tuple(nothing[:3]) == pytest.approx((1, 1, 1), abs=0.01)
    for colour, blue in ((weak_for, True), (strong_for, True), (against, False)):
        assert (colour[2] > colour[0]) == blue
    assert strong_for[0] < weak_for[0]  # darker
    bottom, top = axis.get_ylim()
    assert bottom > top  # layer 0 at the top, as in the table
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("head", "layer")


def test_the_flow_of_a_head_is_drawn_from_key_to_query() -> None:
    figure = views.head_flow_view(TOKENS, FLOW).figure()
    first, second = figure.axes[:2]
    np.testing.assert_array_equal(first.images[0].get_array(), FLOW[0, 0])  # rows are queries
    assert first.get_title() == "L0H0 −2.5" and second.get_title() == "L0H1 +1.0"
    assert first.get_xlabel() == "from (key)" and first.get_ylabel() == "to (query)"
    assert first.images[0].get_clim() == (-2.5, 2.5)


def test_tokens_are_coloured_by_their_own_values() -> None:
    figure = views.token_view(TOKENS, np.array([0.0, -2.0, 2.0])).figure()
    nothing, against, speaks_for = (patch.get_facecolor() for patch in figure.axes[0].patches)
    assert nothing[:3] == pytest.approx((1, 1, 1), abs=0.01)
    assert against[0] > against[2] and speaks_for[2] > speaks_for[0]


def test_bars_of_the_account_pile_up_by_sign() -> None:
    account = pd.DataFrame({"layer": ["0"], "value": [1.0], "relevance": [0.5], "softmax": [-0.5], "norm": [0.75], "biases": [0.25]})
    bars = {(patch.get_y(), patch.get_height()) for patch in views.conservation_view(account).figure().axes[0].patches}
    assert bars == {(0.0, -0.5), (0.0, 0.75), (0.75, 0.25)}


def test_a_scatter_has_its_columns_on_their_axes_and_the_diagonal_across_both() -> None:
    frame = pd.DataFrame({"patching": [-1.0, 0.5, 2.0], "relevance": [-3.0, 0.0, 4.0]})
    axis = views.scatter_view(frame, "patching", "relevance").figure().axes[0]
    np.testing.assert_array_equal(axis.collections[0].get_offsets(), frame.to_numpy())
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("patching", "relevance")
    np.testing.assert_array_equal(axis.lines[0].get_xydata(), [[-3, -3], [4, 4]])


def test_numbers_too_small_are_scaled_with_their_limit() -> None:
    props = props_of(views.token_multi_view(TOKENS, {"a": np.array([3e-7, -2e-7, 0.0])}))
    assert props["positiveBounds"] == [3.0] and props["negativeBounds"] == [-3.0]


# The report


@pytest.fixture
def findings() -> Findings:
    """A report made by hand: head L0H1 carries most from Mary (1) to and (2), against the answer; and some from <s> to Mary, for it."""
    pairs = PromptPairs(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]]), logit_diff(5, 6))
    flow = torch.zeros(1, 2, 3, 3)
    flow[0, 1, 2, 1], flow[0, 1, 1, 0], flow[0, 0, 2, 2] = -0.9, 0.5, 0.2
    heads = pd.DataFrame(
        {
            **{"head": ["L0H1", "L0H0"], "layer": 0, "index": [1, 0], "relevance": [-0.4, 0.2], "standard_error": [0.1, 0.05]},
            **{"top_share": [1.0, 0.5], "patching": [-0.3, 0.25], "denoising": [-0.2, 0.3], "noising": [-0.4, 0.2]},
        }
    )
    account = pd.DataFrame(
        {"layer": ["embed", "0"], "value": 3.0, "relevance": [2.0, 2.5], "biases": [0.2, 0.5], "unexplained": [0.003, -0.3]}
    )
    return Findings(
        question=Question("a question", "in words", pairs, False),
        rules="deeplift",
        target="logit(' Mary') - logit(' John')",
        asked=[" Mary", " John"],
        info={"model": "model", "ruleset": "deeplift"},
        prompt="Mary and",
        counterpart="John and",
        tokens=TOKENS,
        predictions=[(" Mary", 0.75), (" John", 0.1)],
        words={"deeplift: against the counterpart": torch.tensor([0.3, -2.0, 1.0])},
        residual=torch.zeros(3, 2),
        flow=flow,
        graph=None,
        circuit=None,
        heads=heads,
        labels=pd.DataFrame({"unit": ["L0H1", "L0H0"]}),
        labels_note="what they write is left out: not in this test",
        expected=None,
        top_k=1,
        pearson=0.91,
        spearman=0.82,
        stability="",
        account=account,
        value=2.0,
        reference_value=-1.0,
        clean=torch.tensor([2.0]),
        corrupt=torch.tensor([-1.0]),
        seconds={},
        missing={"intervals": "not in this test"},
    )


def test_the_strongest_move_leads_from_the_key_to_the_query(findings: Findings) -> None:
    assert findings.strongest_move(0, 1) == "Mary (1) → and (2)"
    assert findings.strongest_move(0, 0) == "and (2) → and (2)"
    assert list(head_table(findings)["carries most from → to"]) == ["Mary (1) → and (2)", "and (2) → and (2)"]
    assert moves_in_words(findings, 0, 1) == "moves −0.90 from “Mary” (1) to “and” (2) and +0.50 from “<s>” (0) to “Mary” (1); −0.40 in all"


def test_what_is_explained_is_the_difference_from_the_counterpart(findings: Findings) -> None:
    assert findings.explained == 3.0 and replace(findings, reference_value=None).explained == 2.0
    assert unexplained(findings) == pytest.approx(0.1)


def test_odds_are_those_of_the_likelier_word(findings: Findings) -> None:
    assert odds(findings) == f"“Mary” is {math.exp(2):.1f} times as likely"
    assert odds(replace(findings, value=-3.0)) == "“John” is 20 times as likely"


def test_the_tiles_name_the_strongest_word_and_head(findings: Findings) -> None:
    page = Page("t")
    in_short(page, findings)
    shown = html.unescape(page.to_html())
    assert "“Mary”" in shown and "−2.00 of −0.70, against the counterpart" in shown
    assert "L0H1, L0H0" in shown and "−0.40, +0.20 logits" in shown and "r = 0.910" in shown
    assert "90%" in shown and "10% of the number is unexplained" in shown


def test_words_in_the_terminal(findings: Findings) -> None:
    words = next(part for part in terminal_report(findings).renderables if isinstance(part, Text) and part.plain.startswith("Words"))
    assert "sum −0.70" in words.plain and "most: Mary (1) −2.00, and (2) +1.00, <s> (0) +0.30" in words.plain
    background = {}
    for span in words.spans:
        style = str(span.style)
        if " on #" in style:
            background[words.plain[span.start : span.end]] = tuple(int(style[-6:][i : i + 2], 16) for i in (0, 2, 4))
    red, _, blue = background[" Mary"]
    assert red > blue + 100  # fully against
    red, _, blue = background[" and"]
    assert red + 50 < blue
    half = [round(255 + (int(POSITIVE[i : i + 2], 16) - 255) / 2) for i in (1, 3, 5)]
    assert background[" and"] == tuple(half)  # half as much as the strongest word
    assert sum(background["<s>"]) > sum(background[" and"]) > sum(background[" Mary"])  # paler as it counts less


def test_findings_are_those_of_the_analyses(embedded: TransformerBridge) -> None:
    found = find(embedded, from_task(embedded, n=4))
    effects = {
        way: activation_patching(embedded, found.question.pairs, "heads", direction=way)
        .to_dataframe()
        .set_index(["layer", "head"])["effect"]
        for way in ("denoising", "noising")
    }
    at = pd.MultiIndex.from_frame(found.heads[["layer", "index"]])
    for way, effect in effects.items():
        np.testing.assert_allclose(found.heads[way], effect.loc[at], rtol=1e-4, atol=1e-5)
    assert (effects["denoising"] - effects["noising"]).abs().max() > 0.01
    np.testing.assert_allclose(found.heads["patching"], (found.heads["denoising"] + found.heads["noising"]) / 2, rtol=1e-6)
    likely = embedded(found.question.pairs.clean[:1])[0, -1].softmax(-1).topk(5).values.detach()
    np.testing.assert_allclose([share for _, share in found.predictions], likely, rtol=1e-4)


def test_the_account_of_a_prompt_without_a_counterpart_is_that_of_propagate(embedded: TransformerBridge) -> None:
    question = from_prompt(embedded, "When Mary and John went to the store, John gave a drink to", "Mary", wrong="John")
    found = find(embedded, question, "deeplift")
    row = question.pairs[:1]
    account = propagate(embedded, row.clean, row.target, rules="deeplift", reference=mean_embedding(), audit=True).conservation()
    assert account["relevance"].abs().min() > 1
    np.testing.assert_allclose(found.account["relevance"], account["relevance"], rtol=1e-4)


def test_small_and_large_numbers_keep_six_digits_on_a_page() -> None:
    assert rounded(np.array([1.2345678e-7, -0.00012345678, 1234567.8])) == [1.23457e-07, -0.000123457, 1234570.0]
