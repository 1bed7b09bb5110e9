"""Views without a browser: numbers, escaping, shapes, files. What a page does when it is opened is tested in test_views_browser.py."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import sys
import types
import warnings
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from scipy import stats

from analyses import views
from analyses.views import scripts
from analyses.views.markup import escape, format_number, script_json, show_token, table_html
from analyses.views.page import Page, View
from lens_relevance.shown_text import visible

EVIL = ["</script><img src=x onerror=alert(1)>", "\"'><b>", "a&lt;b", "\u2028$x$\n", "<!--"]
TOKENS = ["<s>", "Once", " upon", " a", " time"]


def example_views(tokens: list[str]) -> dict[str, View]:
    """One view of every kind over five tokens."""
    rng = np.random.default_rng(0)
    count = len(tokens)
    scores = rng.normal(size=(3, 2))
    account = pd.DataFrame({"layer": ["embed", "0", "output"], "value": 2.0, "relevance": [1.0, 1.5, 2.0], "biases": [0.5, -0.2, 0.0]})
    frame = pd.DataFrame(
        {"head": [f"{token}{i}" for i, token in enumerate(tokens)], "a": rng.normal(size=count), "b": rng.normal(size=count)}
    )
    nodes = pd.DataFrame(
        {
            "node": ["embed", "L0H1", "L0H1.q", "L1.mlp", "logits"],
            "position": [1, 3, 3, 4, 4],
            "score": [0.25, -0.5, 0.125, 1.0, 2.0],
            "details": [None, {"note": tokens[0], "sources": [{"token": tokens[1], "score": 0.1}]}, None, None, None],
        }
    )
    edges = pd.DataFrame(
        {
            "source": ["embed", "L0H1", "L1.mlp", "bias"],
            "target": ["L0H1.v", "L1.mlp.in", "logits", "logits"],
            "position": [3, 4, 4, 4],
            "source_position": [1, 3, np.nan, np.nan],
            "score": [-0.5, 0.75, 1.0, 0.25],
        }
    )
    return {
        "token": views.token_view(tokens, torch.tensor(rng.normal(size=count))),
        "token_multi": views.token_multi_view(tokens, {"layer 0": rng.normal(size=count), tokens[0]: rng.normal(size=count)}),
        "neuron": views.neuron_view(tokens, {0: rng.normal(size=(count, 7)), 2: rng.normal(size=(count, 7))}, top=3),
        "head_flow": views.head_flow_view(tokens, np.tril(rng.normal(size=(2, 2, count, count)))),
        "head_heatmap": views.head_heatmap_view(scores),
        "layer": views.layer_view(tokens, rng.normal(size=(count, 4))),
        "head_comparison": views.head_comparison_view(scores, scores / 2),
        "scatter": views.scatter_view(frame, "a", "b", label="head"),
        "curve": views.curve_view({tokens[0]: pd.Series([1.0, 0.5], index=[0, 1])}, "removed", "logit", title="Perturbation"),
        "conservation": views.conservation_view(account),
        "flow": views.flow_view(nodes, edges, tokens, target="logit diff"),
    }


KINDS = list(example_views(TOKENS))


class _Tags(HTMLParser):
    """Start tags with their attributes, and the text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def parsed(html: str) -> _Tags:
    parser = _Tags()
    parser.feed(html)
    return parser


def props_of(view: View) -> dict[str, Any]:
    """The JSON that the view's script call carries."""
    match = re.search(r'lensRelevance\.show\("[0-9a-f]+","\w+",(\{.*\})\)</script>$', view.html, re.DOTALL)
    assert match is not None
    return dict(json.loads(match[1]))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def shown(value: Any) -> Any:
    """Text as a page holds it: characters that would command are escaped; see tests/runs/test_shown_text.py."""
    if isinstance(value, str):
        return visible(value, keep="\n\t\r")
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    return [shown(item) for item in value] if isinstance(value, list) else value


@given(json_values)
def test_json_in_a_script_reads_back_and_cannot_end_the_script(value: Any) -> None:
    text = script_json(value)
    assert json.loads(text) == shown(value)
    assert not re.search("[<>&\u2028\u2029\n]", text)


@given(st.text())
def test_escaped_text_reads_back_as_text_and_as_attribute(text: str) -> None:
    text = text.replace("\r", "")
    tags = parsed(f'<p title="{escape(text)}">{escape(text)}</p>')
    assert [tag for tag, _ in tags.tags] == ["p"]
    assert (tags.tags[0][1]["title"], tags.text) == (shown(text), shown(text))


def test_json_of_what_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError):
        script_json({"score": float("nan")})
    with pytest.raises(ValueError, match="set cannot be shown"):
        script_json({1, 2})


@pytest.mark.usefixtures("pictures_as_dots")
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_from_prompts_never_become_markup(kind: str) -> None:
    page = parsed(Page(EVIL[0], EVIL[1]).quote(EVIL[0], EVIL[1]).view(example_views(EVIL)[kind], EVIL[0]).to_html())
    assert not [attributes for tag, attributes in page.tags if tag == "img" and not (attributes["src"] or "").startswith("data:")]
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert not [tag for tag, _ in page.tags if tag == "b" and kind != "scatter"]  # scatter writes its correlation in bold
    assert EVIL[0] in page.text


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_has_html_and_static_twins(kind: str) -> None:
    view = example_views(TOKENS)[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        png, svg = view.png(), view.svg()
    assert imread(io.BytesIO(png), format="png").std() > 0.01  # something is drawn
    assert svg.startswith(b"<?xml") and svg.rstrip().endswith(b"</svg>")
    again = example_views(TOKENS)[kind]
    assert (again.png(), again.svg(), again.html) == (png, svg, view.html)
    assert len(view.to_html()) < 3_000_000


def test_static_pictures_show_dollars_and_missing_glyphs_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert views.token_view(["$x_1$", "猫", "\n", "\t", ""], np.arange(5.0)).png()
        assert views.layer_view(["$x_{$", "猫", "\n", "🙂", ""], np.ones((5, 2))).png()


def test_a_page_needs_nothing_from_outside_and_holds_circuitsvis_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a view asked the network")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    page = Page("All")
    for view in example_views(TOKENS).values():
        page.view(view)
        assert view._repr_html_()
    html = page.to_html()
    assert html.count("lensRelevance.installCircuitsVis(") == 1
    tags = parsed(html).tags
    assert not [tag for tag, _ in tags if tag in ("link", "iframe", "object", "embed", "base")]
    sources = [value or "" for _, attributes in tags for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
    assert sources and all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert len(html.encode()) < 3_000_000


def test_a_page_without_circuitsvis_is_small() -> None:
    html = Page("Heads").view(example_views(TOKENS)["head_heatmap"]).to_html()
    assert 'installCircuitsVis("' not in html and len(html) < 60_000


def test_circuitsvis_comes_in_the_colours_of_the_other_pictures() -> None:
    source = 'function Jl(e,t,r,n="red",o="blue"){return e}'
    assert scripts._our_colours(source) == 'function Jl(e,t,r,n="#b2182b",o="#2166ac"){return e}'


class TestNotebook:
    @pytest.fixture(autouse=True)
    def _new_notebook(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scripts, "_carrying_cell", None)

    def test_a_bundle_has_html_png_and_text(self) -> None:
        for view in example_views(TOKENS).values():
            bundle, metadata = view._repr_mimebundle_()
            assert set(bundle) == {"text/html", "image/png", "text/plain"}
            assert bundle["text/plain"].startswith("View(")
            assert view.html in bundle["text/html"]
            assert metadata["image/png"]["width"] == pytest.approx(96 * view.figure().get_figwidth(), abs=1)

    def test_every_picture_is_seen_in_its_colours_where_scripts_and_styles_are_stripped(self) -> None:
        for kind, view in example_views(TOKENS).items():
            stripped = parsed(re.sub(r"<(script|style)>.*?</\1>", "", view._repr_html_(), flags=re.DOTALL))
            pictures = [attributes["src"] or "" for tag, attributes in stripped.tags if tag == "img"]
            assert len(pictures) == 1 and view.title in stripped.text, kind
            pixels = imread(io.BytesIO(base64.b64decode(pictures[0].partition(",")[2])), format="png")[..., :3]
            assert (pixels[..., 2] > pixels[..., 0] + 0.3).any(), kind  # blue
            if kind not in ("scatter", "curve", "conservation"):  # the others have no signed colours
                assert (pixels[..., 0] > pixels[..., 2] + 0.3).any(), kind  # red

    def test_circuitsvis_goes_with_the_first_output_only(self) -> None:
        views_by_kind = example_views(TOKENS)
        outputs = [views_by_kind[kind]._repr_html_() for kind in ("head_heatmap", "token", "neuron", "head_flow")]
        assert ['installCircuitsVis("' in output for output in outputs] == [False, True, False, False]
        assert all(len(output) < 150_000 for output in (outputs[0], *outputs[2:]))

    def test_running_the_carrying_cell_again_carries_the_script_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cell = {"metadata": {"cellId": "one"}}
        shell = types.SimpleNamespace(get_parent=lambda: cell)
        monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
        view = example_views(TOKENS)["token"]
        carried = []
        for name in ("one", "two", "one"):
            cell["metadata"]["cellId"] = name
            carried.append('installCircuitsVis("' in view._repr_html_())
        assert carried == [True, False, True]

    def test_colab_shows_every_output_by_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
        view = example_views(TOKENS)["token"]
        assert all('installCircuitsVis("' in view._repr_html_() for _ in range(2))


def test_saving_goes_by_the_ending(tmp_path: Any) -> None:
    view = example_views(TOKENS)["flow"]
    assert view.save(tmp_path / "flow.png").read_bytes() == view.png()
    assert view.save(tmp_path / "flow.svg").read_bytes() == view.svg()
    assert view.save(tmp_path / "flow.html").read_text(encoding="utf-8") == view.to_html()
    with pytest.raises(ValueError, match=r"use \.html, \.png or \.svg"):
        view.save(tmp_path / "flow.pdf")


def test_token_values_are_those_given_on_a_symmetric_scale() -> None:
    relevance = torch.tensor([0.5, -2.0, 0.25, 1 / 3, 0.0], dtype=torch.float32)
    props = props_of(views.token_view(TOKENS, relevance))
    np.testing.assert_allclose(props["values"], relevance.numpy(), rtol=1e-5)
    assert (props["minValue"], props["maxValue"]) == (-2.0, 2.0)
    assert props_of(views.token_view(TOKENS, torch.zeros(5)))["maxValue"] == 1.0  # no division by zero


def test_bfloat16_is_shown() -> None:
    values = torch.tensor([0.5, -2.0, 0.25, 1.0, 0.0], dtype=torch.bfloat16)
    assert props_of(views.token_view(TOKENS, values))["values"] == [0.5, -2.0, 0.25, 1.0, 0.0]


def test_several_values_share_a_scale_or_are_divided_by_their_own() -> None:
    frame = pd.DataFrame({"relp": [1.0, -4.0, 0, 0, 0], "norm": [100.0, 50.0, 0, 0, 0]})
    together = props_of(views.token_multi_view(TOKENS, frame))
    assert together["labels"] == ["relp", "norm"]
    assert together["positiveBounds"] == [100.0, 100.0] and together["negativeBounds"] == [-100.0, -100.0]
    apart = props_of(views.token_multi_view(TOKENS, frame, shared_scale=False))
    assert apart["labels"] == ["relp / 4", "norm / 100"]
    np.testing.assert_allclose(apart["values"], frame.to_numpy() / [4.0, 100.0])


def test_numbers_too_small_for_circuitsvis_are_shown_in_a_smaller_unit() -> None:
    values = np.array([3e-7, -2e-7, 0, 0, 1e-8])
    props = props_of(views.token_multi_view(TOKENS, {"layer 0": values}))
    assert props["labels"] == ["layer 0 (1e-7)"]
    np.testing.assert_allclose(np.array(props["values"])[:, 0] * 1e-7, values, rtol=1e-5)


def test_heads_are_ranked_by_the_sum_of_their_flow() -> None:
    flow = np.zeros((2, 2, 3, 3))
    flow[0, 1, 2, 0], flow[1, 0, 1, 1], flow[1, 1, 2, 2] = 0.5, -2.0, 1.0
    props = props_of(views.head_flow_view(TOKENS[:3], flow, top=3))
    assert props["attentionHeadNames"] == ["L1H0 −2.0", "L1H1 +1.0", "L0H1 +0.50"]
    np.testing.assert_array_equal(props["attention"], flow.reshape(4, 3, 3)[[2, 3, 1]])
    assert (props["minValue"], props["maxValue"]) == (-2.0, 2.0)


@pytest.mark.usefixtures("pictures_as_dots")
def test_flow_from_later_tokens_is_not_hidden_by_a_causal_mask() -> None:
    flow = np.ones((1, 2, 3, 3))
    with pytest.raises(ValueError, match="causal=False"):
        views.head_flow_view(TOKENS[:3], flow)
    np.testing.assert_array_equal(props_of(views.head_flow_view(TOKENS[:3], flow, causal=False))["attention"], flow[0])


def test_top_neurons_are_those_of_a_plain_sort() -> None:
    rng = np.random.default_rng(1)
    relevance = {layer: rng.normal(size=(5, 20)) for layer in (0, 3)}
    ranked = views.top_neurons(relevance, top=6)
    every = {(layer, neuron): values[:, neuron].sum() for layer, values in relevance.items() for neuron in range(20)}
    best = sorted(every, key=lambda key: -abs(every[key]))[:6]
    assert list(zip(ranked["layer"], ranked["neuron"], strict=True)) == best
    np.testing.assert_allclose(ranked["score"], [every[key] for key in best])
    props = props_of(views.neuron_view(TOKENS, relevance, top=6))
    assert props["labels"] == [f"L{layer}N{neuron}" for layer, neuron in best]
    np.testing.assert_allclose(np.array(props["values"])[:, 0], relevance[best[0][0]][:, best[0][1]], rtol=1e-5)


def test_heat_maps_hold_the_numbers_given() -> None:
    scores = np.random.default_rng(2).normal(size=(3, 4))
    shown = props_of(views.head_heatmap_view(scores))["maps"][0]
    np.testing.assert_allclose(shown["values"], scores, rtol=1e-5)
    assert shown["tips"][1][1] == f"L1H1\n{format_number(scores[1, 1], digits=4)}"
    residual = np.random.default_rng(3).normal(size=(5, 3))
    shown = props_of(views.layer_view(TOKENS, residual))["maps"][0]
    np.testing.assert_allclose(shown["values"], residual.T[::-1], rtol=1e-5)  # embeddings at the bottom
    assert shown["tips"][0][0].startswith("“<s>” (0), after layer 1") and shown["tips"][-1][-1].startswith("“ time” (4), embeddings")


def test_cells_carry_their_numbers_where_there_is_room() -> None:
    scores = np.array([[32.14, -5.26], [0.04, 0.0]])
    view = views.head_heatmap_view(scores)
    assert props_of(view)["maps"][0]["numbers"] == [["+32.1", "−5.3"], ["", ""]]  # what rounds to zero is left out
    assert [text.get_text() for text in view.figure().axes[0].texts] == ["+32.1", "−5.3", "", ""]
    wide = np.ones((2, 30))
    assert props_of(views.head_heatmap_view(wide))["maps"][0]["numbers"] is None
    assert not views.head_heatmap_view(wide).figure().axes[0].texts


def test_a_comparison_shows_both_and_their_difference() -> None:
    first, second = np.random.default_rng(4).normal(size=(2, 3, 4))
    maps = props_of(views.head_comparison_view(first, second))["maps"]
    np.testing.assert_allclose([one["values"] for one in maps], [first, second, first - second], rtol=1e-4)
    assert len({one["limit"] for one in maps}) == 1  # one scale


def test_a_scatter_tells_the_correlations_and_the_numbers() -> None:
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"head": list("abcdefgh"), "relevance": rng.normal(size=8), "patching": rng.normal(size=8)})
    frame.loc[3, "patching"] = np.nan
    kept = frame.dropna()
    tags = parsed(views.scatter_view(frame, "relevance", "patching", label="head").html).tags
    shown = [float(attributes["data-value"] or "nan") for tag, attributes in tags if tag == "b"]
    expected = [stats.pearsonr(kept["relevance"], kept["patching"])[0], stats.spearmanr(kept["relevance"], kept["patching"])[0], 7]
    np.testing.assert_allclose(shown, expected, rtol=1e-5)
    values = [float(attributes["data-value"] or "nan") for tag, attributes in tags if tag == "td" and "data-value" in attributes]
    np.testing.assert_array_equal(values, kept[["relevance", "patching"]].to_numpy().ravel())


def test_what_is_constant_correlates_with_nothing() -> None:
    view = views.scatter_view(pd.DataFrame({"a": [1.0, 1.0, 1.0], "b": [1.0, 2.0, 3.0]}), "a", "b")
    assert 'Pearson <b data-value="nan">–</b>' in view.html
    assert view.png()


def test_conservation_draws_the_sinks_that_kept_something() -> None:
    account = pd.DataFrame(
        {
            "example": [0, 0, 1, 1],
            "layer": ["embed", "0"] * 2,
            "value": [2.0, 2.0, 4.0, 4.0],
            "relevance": [1.0, 1.5, 3.0, 3.5],
            "softmax": [-0.5, 0.25, -1.5, 0.75],
            "gate": 0.0,
        }
    )
    view = views.conservation_view(account)
    html = parsed(view.html)
    assert "softmax" in html.text and "gate" not in html.text
    values = [float(attributes["data-value"] or "nan") for tag, attributes in html.tags if tag == "td" and "data-value" in attributes]
    np.testing.assert_allclose(values, [3.0, 2.0, -1.0, 3.0, 2.5, 0.5])  # means over the two examples
    bars = [patch.get_height() for patch in view.figure().axes[0].patches]
    np.testing.assert_allclose(bars, [-1.0, 0.5])


def test_curves_hold_their_points() -> None:
    curves = {"MoRF": pd.Series([3.0, 1.0, 0.5], index=[0, 1, 2]), "LeRF": pd.Series([3.0, 2.5], index=[0, 2])}
    view = views.curve_view(curves, "tokens removed", "logit", title="Perturbation", baseline=1)
    lines = {line.get_label(): line.get_xydata().tolist() for line in view.figure().axes[0].lines}
    assert lines["MoRF"] == [[0, 3.0], [1, 1.0], [2, 0.5]] and lines["LeRF"] == [[0, 3.0], [2, 2.5]]
    assert [line.get_ydata() for line in view.figure().axes[0].lines][0] == [1, 1]  # the baseline
    assert parsed(view.html).text.count("–") == 1  # LeRF has no value at 1
    logarithmic = views.curve_view(curves, "k", "f", title="Faithfulness", log_x=True).figure().axes[0]
    assert logarithmic.lines[0].get_xdata().tolist() == [1, 2]  # a logarithm has no 0


def test_curves_of_one_method_share_a_colour_and_differ_in_their_dashes() -> None:
    points = pd.Series([1.0, 0.5], index=[0, 1])
    names = ["relp, MoRF", "relp, LeRF", "gim, MoRF", "gim, LeRF"]
    lines = views.curve_view(dict.fromkeys(names, points), "x", "y", title="t").figure().axes[0].lines
    colours, dashes = [line.get_color() for line in lines], [line.get_linestyle() for line in lines]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    assert dashes[0] == dashes[2] != dashes[1] == dashes[3]


def test_tables_keep_full_numbers_and_escape_text() -> None:
    frame = pd.DataFrame({"head": ["<b>L0H1</b>", "L1H0"], "score": [0.123456789, -2.0], "rank": [1, 2], "kept": [True, False]})
    html = table_html(frame, caption="`score` is <signed>", bars=["score"])
    tags = parsed(html)
    assert "<b>L0H1</b>" in tags.text and "yes" in tags.text and "score is <signed>" in tags.text
    values = [float(attributes["data-value"] or "nan") for tag, attributes in tags.tags if tag == "td" and "data-value" in attributes]
    assert values == [0.123456789, 1.0, -2.0, 2.0]
    bars = [(attributes["class"], attributes["style"]) for tag, attributes in tags.tags if tag == "i"]
    assert bars == [("lr-pos", "--v:0.0617"), ("lr-neg", "--v:1.0000")]
    with pytest.raises(ValueError, match="no column 'relevance'"):
        table_html(frame, bars=["relevance"])


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ([7.9063, -0.14217, 0.0907, -0.001], ["7.91", "−0.14", "0.09", "0.00"]),
        ([0.98654, 1.0, 0.5], ["0.987", "1.000", "0.500"]),
        ([446.2, 1234.5, -0.2], ["446", "1,234", "0"]),
        ([-3.815e-6, 0.0, 1e-7], ["−3.81e−06", "0", "1.00e−07"]),
        ([float("nan"), float("inf"), 12.34], ["–", "–", "12.3"]),
    ],
)
def test_the_numbers_of_a_column_line_up(column: list[float], shown: list[str]) -> None:
    assert re.findall(r"<td[^>]*>(.*?)</td>", table_html(pd.DataFrame({"x": column}))) == shown


def test_a_quote_marks_the_words_that_differ() -> None:
    html = Page("t").quote("Ann gave it to <b>Bob</b>.", against="Ann sold it to Eve.").to_html()
    assert re.findall("<mark>(.*?)</mark>", html) == ["gave", "&lt;b&gt;Bob&lt;/b&gt;."]
    assert "<mark>" not in Page("t").quote("Ann gave it", against="Ann gave it").to_html()


def test_tiles_are_text() -> None:
    tags = parsed(Page("t").tiles({EVIL[0]: (EVIL[1], EVIL[2])}).to_html())
    assert all(text in tags.text for text in EVIL[:3])
    assert not [tag for tag, _ in tags.tags if tag in ("img", "b")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "+1.00"),
        (-0.12345, "−0.123"),
        (1234.5, "+1,234"),
        (0.00042, "+0.000420"),
        (3.2e-7, "+3.20e−07"),
        (float("nan"), "–"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(("token", "label"), [(" Mary", "Mary"), ("\n", "↵"), (" ", "␣"), ("", "␣"), ("a b", "a b")])
def test_labels_of_tokens(token: str, label: str) -> None:
    assert show_token(token) == label


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: views.token_view("Once upon", np.zeros(9)), "tokens is one string"),
        (lambda: views.token_view(TOKENS, np.zeros(4)), "4 positions but there are 5 tokens"),
        (lambda: views.token_view(TOKENS, np.array([0, np.nan, 0, np.inf, 0])), "2 values that are not finite"),
        (lambda: views.token_multi_view(TOKENS, {}), "relevance is empty"),
        (lambda: views.token_multi_view(TOKENS, {"a": np.zeros(3)}), r"relevance\['a'\] has 3 positions"),
        (lambda: views.neuron_view(TOKENS, {}), "relevance is empty"),
        (lambda: views.head_flow_view(TOKENS[:3], np.zeros((2, 3, 3))), "one name for each"),
        (lambda: views.layer_view(TOKENS, np.zeros((5, 3)), labels=["a"]), "3 layers but there are 1 labels"),
        (lambda: views.scatter_view(pd.DataFrame({"a": [1.0]}), "a", "b"), "no column 'b'"),
        (lambda: views.scatter_view(pd.DataFrame({"a": [1.0], "b": [1.0]}), "a", "b"), "at least 2 rows"),
        (lambda: views.curve_view({}, "x", "y", title="t"), "no curves"),
        (lambda: views.conservation_view(pd.DataFrame({"layer": ["0"]})), "no column 'value'"),
        (lambda: Page("t").heading("h", level=1), "level 2 and 3"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
