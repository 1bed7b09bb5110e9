"""Every kind of page in a real headless browser: no error, no request, and hover, click, slider, search and keys do what they say."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses import views
from analyses.views import scripts
from analyses.views.flow_layout import curve
from analyses.views.page import Page, View
from tests.analyses.browser import Browser, headless_chromium
from tests.analyses.test_views import EVIL, KINDS, TOKENS, example_views

TIP = "document.querySelector('.lr-tip:not([hidden])')?.innerText"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_chromium() as started:
        yield started


def write(view: View | Page, folder: Path) -> Path:
    path = folder / "page.html"
    path.write_text(view.to_html(), encoding="utf-8")
    return path


def rgb(text: str) -> np.ndarray:
    return np.array([float(part) for part in re.findall(r"[\d.]+", text)[:3]])


# ---- every kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_on_a_desktop(browser: Browser, tmp_path: Path, kind: str) -> None:
    tab = browser.open(write(example_views(TOKENS)[kind], tmp_path))
    assert tab.problems() == []
    box = tab.run("(() => { const b = document.querySelector('.lr-view').getBoundingClientRect(); return [b.width, b.height]; })()")
    assert min(box) > 20
    assert rgb(tab.run("getComputedStyle(document.body).backgroundColor")).mean() == 255
    tab.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_opens_on_a_phone_in_the_dark_with_markup_in_its_tokens_shown_as_text(browser: Browser, tmp_path: Path, kind: str) -> None:
    page = Page(EVIL[0]).quote(EVIL[0]).view(example_views(EVIL)[kind], EVIL[1])
    tab = browser.open(write(page, tmp_path), width=390, dark=True)
    assert tab.problems() == []
    assert tab.run("document.documentElement.scrollWidth") <= 390  # nothing sticks out sideways
    assert rgb(tab.run("getComputedStyle(document.body).backgroundColor")).mean() < 60
    assert tab.run("document.querySelectorAll('img:not([src^=\"data:image/png\"])').length") == 0
    assert tab.run("document.title") == EVIL[0] == tab.run("document.querySelector('blockquote').textContent")
    if kind in ("token", "token_multi", "neuron"):  # the word joiner that keeps it from being markup has no width
        shown = tab.run("document.querySelector('.colored-tokens').textContent").replace("\u2060", "").replace("\xa0", " ")
        assert shown.startswith(EVIL[0]) and EVIL[2] in shown
    if kind == "flow":
        tab.click('[data-node="L0H1"]')
        text = tab.run("document.querySelector('.lr-flow-panel').innerText")
        assert EVIL[0] in text and EVIL[1] in text  # details of the node, and the token of its edge
        assert tab.problems() == []
    tab.close()


def test_the_browser_refuses_a_request_that_a_page_tries(browser: Browser, tmp_path: Path) -> None:
    """The test of the tests: a request would be seen, and the page's own policy stops it."""
    page = write(example_views(TOKENS)["head_heatmap"], tmp_path)
    html = page.read_text(encoding="utf-8").replace("</main>", "<img src='http://127.0.0.1:9/x.png'></main>")
    page.write_text(html, encoding="utf-8")
    tab = browser.open(page)
    assert any("Content Security Policy" in problem for problem in tab.problems())
    page.write_text(re.sub("<meta http-equiv[^>]*>", "", html), encoding="utf-8")
    tab.close()
    tab = browser.open(page)
    assert any("request: http://127.0.0.1:9/x.png" in problem for problem in tab.problems())
    tab.close()


# ---- CircuitsVis


def test_hovering_a_token_tells_its_number_and_colour_tells_its_sign(browser: Browser, tmp_path: Path) -> None:
    values = np.array([0.5, -2.0, 0.0, 2.0, 1 / 3])
    tab = browser.open(write(views.token_view(TOKENS, values), tmp_path))
    tab.wait("document.querySelectorAll('.colored-tokens > span').length === 5")
    colours = [
        rgb(tab.run(f"getComputedStyle(document.querySelectorAll('.colored-tokens > span > span')[{i}]).backgroundColor")) for i in range(5)
    ]
    np.testing.assert_allclose(colours[1], [0xB2, 0x18, 0x2B], atol=1)
    np.testing.assert_allclose(colours[2], [255, 255, 255], atol=1)
    np.testing.assert_allclose(colours[3], [0x21, 0x66, 0xAC], atol=1)
    for i, value in enumerate(values):
        tab.hover(f".colored-tokens > span:nth-of-type({i + 1})")
        tip = "[...document.querySelectorAll('.colored-tokens > div')].map((e) => e.innerText).join()"
        tab.wait(f"{tip} !== ''")
        token, number = tab.run(tip).split("\n")
        assert token.replace("\u2060", "") == TOKENS[i].strip() and float(number) == pytest.approx(value, rel=1e-5)
        tab.move(5, 5)
        tab.wait(f"{tip} === ''")
    assert tab.problems() == []
    tab.close()


def test_choosing_a_layer_recolours_the_tokens_and_hovering_tells_all_layers(browser: Browser, tmp_path: Path) -> None:
    values = {"layer 0": np.array([1.0, 0, 0, 0, 0]), "layer 1": np.array([0, -1.0, 0, 0, 0.25])}
    tab = browser.open(write(views.token_multi_view(TOKENS, values), tmp_path))
    colours = "[...document.querySelectorAll('.colored-tokens > span > span')].map((e) => getComputedStyle(e).backgroundColor)"
    first = [rgb(colour) for colour in tab.run(colours)]
    np.testing.assert_allclose(first[0], [0x21, 0x66, 0xAC], atol=1)
    np.testing.assert_allclose(first[1], [255, 255, 255], atol=1)
    tab.run("document.querySelectorAll('.lr-circuitsvis > div > div:first-child > div')[1].id = 'second'")
    tab.click("#second")
    second = [rgb(colour) for colour in tab.run(colours)]
    np.testing.assert_allclose(second[0], [255, 255, 255], atol=1)
    np.testing.assert_allclose(second[1], [0xB2, 0x18, 0x2B], atol=1)
    tab.hover(".colored-tokens > span:nth-of-type(5)")
    rows = tab.run("[...document.querySelectorAll('.colored-tokens td')].map((e) => e.innerText)")
    assert rows == ["layer 0", "0.000000", "layer 1", "0.250000"]
    assert tab.problems() == []
    tab.close()


def test_the_chosen_head_is_drawn_large_in_the_colours_of_its_signs(browser: Browser, tmp_path: Path) -> None:
    flow = np.zeros((1, 2, 3, 3))
    flow[0, 0, 2, 0], flow[0, 1, 1, 0] = 2.0, -1.0
    tab = browser.open(write(views.head_flow_view(TOKENS[:3], flow), tmp_path))
    names = tab.run("[...document.querySelectorAll('.lr-circuitsvis h4')].map((e) => e.textContent)")
    assert names == ["L0H0 +2.0", "L0H1 −1.0"]
    ink = """(() => { const c = [...document.querySelectorAll('canvas')].at(-1);
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      let blue = 0, red = 0; for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) {
        if (d[i + 2] > d[i] + 60) blue += 1; if (d[i] > d[i + 2] + 60) red += 1; } return [blue, red]; })()"""
    heading = "[...document.querySelectorAll('.lr-circuitsvis h3')].at(-1).textContent"
    assert tab.run(heading) == "L0H0 +2.0 Zoomed"
    tab.wait(f"{ink}[0] > 1000")
    assert tab.run(ink)[1] == 0
    tab.run("document.querySelectorAll('.lr-circuitsvis h4')[1].parentElement.id = 'second'")
    tab.click("#second")
    tab.move(5, 5)
    assert tab.run(heading) == "L0H1 −1.0 Zoomed"
    tab.wait(f"{ink}[1] > 1000")
    assert tab.run(ink)[0] == 0
    assert tab.run("document.querySelector('.lr-view').lensRelevance.attention") == flow[0].tolist()
    assert tab.problems() == []
    tab.close()


def test_a_notebook_mounts_outputs_as_they_come_and_shares_one_script(
    browser: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As JupyterLab does it: innerHTML, then every script element is made anew. The same view twice, and one more without the script."""
    monkeypatch.setattr(scripts, "_carrying_cell", None)
    by_kind = example_views(TOKENS)
    outputs = [by_kind[kind]._repr_html_() for kind in ("token", "flow", "neuron", "token", "head_heatmap")]
    payload = json.dumps(outputs).replace("<", "\\u003c")
    page = tmp_path / "notebook.html"
    page.write_text(
        f"""<!DOCTYPE html><meta charset="utf-8"><body><script>
        for (const output of {payload}) {{
          const cell = document.createElement("div"); document.body.append(cell); cell.innerHTML = output;
          cell.querySelectorAll("script").forEach((old) => {{
            const made = document.createElement("script"); made.textContent = old.textContent; old.replaceWith(made);
          }});
        }}</script>""",
        encoding="utf-8",
    )
    tab = browser.open(page)
    tab.wait("document.querySelectorAll('.colored-tokens').length === 3")
    assert tab.run("document.querySelectorAll('.lr-flow').length") == 1
    assert tab.run("[...document.querySelectorAll('.lr-static')].filter((image) => image.getBoundingClientRect().width > 0).length") == 0
    assert tab.problems() == []
    tab.close()


def test_a_picture_whose_script_is_gone_stays_a_static_one(
    browser: Browser,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scripts, "_carrying_cell", "the first cell, since deleted")
    page = tmp_path / "notebook.html"
    page.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{example_views(TOKENS)["token"]._repr_html_()}', encoding="utf-8")
    tab = browser.open(page.with_name("notebook.html"), settle=False)
    assert tab.run("document.querySelector('.lr-static').complete && document.querySelector('.lr-static').naturalWidth") > 100
    assert tab.problems() == []
    tab.close()


# ---- heat maps


def test_heat_map_cells_tell_their_numbers_on_hover_and_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    scores = np.array([[0.5, -1.0], [0.25, 0.0]])
    tab = browser.open(write(views.head_heatmap_view(scores), tmp_path))
    assert tab.run("[...document.querySelectorAll('.lr-heat td')].map((e) => +e.dataset.value)") == scores.ravel().tolist()
    colours = tab.run("[...document.querySelectorAll('.lr-heat td')].map((e) => getComputedStyle(e).backgroundColor)")
    scale = [1 if "srgb" not in colour else 255 for colour in colours]
    drawn = [rgb(colour.replace("color(srgb", "")) * factor for colour, factor in zip(colours, scale, strict=True)]
    np.testing.assert_allclose(drawn[1], [0xB2, 0x18, 0x2B], atol=1)
    np.testing.assert_allclose(drawn[3], [255, 255, 255], atol=1)
    np.testing.assert_allclose(drawn[0], (np.array([0x21, 0x66, 0xAC]) + 255) / 2, atol=1)
    tab.hover(".lr-heat tbody tr:nth-child(1) td:nth-of-type(2)")
    assert tab.run(TIP).split() == ["L0H1", "−1.000"]
    tab.move(5, 500)
    assert tab.run(TIP) is None
    tab.run("document.querySelector('.lr-heat td').focus()")
    assert tab.run(TIP).split() == ["L0H0", "+0.5000"]
    tab.press("ArrowDown")
    tab.press("ArrowRight")
    tab.press("ArrowRight")  # at the edge: stays
    assert tab.run(TIP).split() == ["L1H1", "0"]
    assert tab.run("document.querySelectorAll('.lr-heat td[tabindex=\"0\"]').length") == 1
    tab.press("Escape")
    assert tab.run(TIP) is None
    assert tab.problems() == []
    tab.close()


# ---- the flow view


def small_graph() -> tuple[pd.DataFrame, pd.DataFrame]:
    nodes = pd.DataFrame(
        {
            "node": ["embed", "L0H1", "L0H1.q", "L0H10", "L1H1", "L1.mlp", "logits"],
            "position": [1, 3, 3, 4, 4, 4, 4],
            "score": [0.25, -0.5, 0.125, 0.0625, 1.25, 1.0, 2.0],
            "details": [
                None,
                {"kind": "name mover", "sources": [{"token": " upon", "score": 0.1}, {"token": " a", "score": -0.2}]},
                *[None] * 5,
            ],
        }
    )
    edges = pd.DataFrame(
        {
            "source": ["embed", "embed", "L0H1", "L1.mlp", "L0H10", "L1H1"],
            "target": ["L0H1.v", "L1H1.k", "L1.mlp.in", "logits", "L1H1.q", "logits"],
            "position": [3, 4, 4, 4, 4, 4],
            "source_position": [1, 1, 3, 4, 4, 4],
            "score": [-0.5, 0.03125, 0.75, 1.0, 0.0625, 0.875],
        }
    )
    return nodes, edges


@pytest.fixture
def flow_page(tmp_path: Path) -> Path:
    nodes, edges = small_graph()
    return write(views.flow_view(nodes, edges, TOKENS, target="logit diff", shown=4), tmp_path)


def blue_and_red(canvas: str) -> str:
    """JavaScript: coloured pixels of a canvas."""
    return f"""(() => {{ const c = document.querySelector('{canvas}');
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      let blue = 0, red = 0; for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 20) {{
        if (d[i + 2] > d[i]) blue += 1; else red += 1; }} return [blue, red]; }})()"""


def test_flow_nodes_carry_the_scores_given(browser: Browser, flow_page: Path) -> None:
    nodes, edges = small_graph()
    tab = browser.open(flow_page)
    drawn = tab.run("[...document.querySelectorAll('.lr-node')].map((e) => [e.dataset.node, +e.dataset.position, +e.dataset.score])")
    given = nodes[nodes["node"] != "L0H1.q"][["node", "position", "score"]].to_numpy().tolist()
    assert sorted(drawn) == sorted(given)
    held = tab.run("document.querySelector('.lr-view').lensRelevance.edges.map((e) => e[2])")
    assert held == sorted(edges["score"], key=abs, reverse=True)
    assert tab.run("document.querySelector('.lr-flow-count').textContent") == "4 of 6, |score| ≥ 0.500"
    assert tab.problems() == []
    tab.close()


def test_flow_edges_are_drawn_where_the_layout_says(browser: Browser, tmp_path: Path) -> None:
    """The curves of the page and of the static picture are the same: the canvas is inked at their middles, in the colour of the sign."""
    nodes, edges = small_graph()
    view = views.flow_view(nodes, edges, TOKENS, shown=6)
    tab = browser.open(write(view, tmp_path))
    middles = []
    for link in view.layout.links:
        source, target = view.layout.marks[link.source], view.layout.marks[link.target]
        (x1, y1), (x2, y2) = curve(source, target)
        middles.append([(source.x + 3 * x1 + 3 * x2 + target.x) / 8, (source.y + 3 * y1 + 3 * y2 + target.y) / 8])
    probe = f"""(() => {{ const c = document.querySelector('.lr-flow-base'), k = c.width / {view.layout.width};
      const around = ([x, y]) => [...c.getContext('2d').getImageData(Math.round(x * k) - 1, Math.round(y * k) - 1, 3, 3).data];
      return {json.dumps(middles)}.map(around); }})()"""
    for link, pixels in zip(view.layout.links, tab.run(probe), strict=True):
        red, _, blue, alpha = max(np.reshape(pixels, (9, 4)).tolist(), key=lambda pixel: pixel[3])
        assert alpha > 30, link
        assert (blue > red) == (link.score > 0), link
    tab.close()


def test_hovering_a_flow_node_tells_component_token_and_share(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    tab.hover('[data-node="L0H1"]')
    assert tab.run(TIP).split("\n") == ["L0H1", "at “ a” (3)", "−0.500 · −25.0 % of logit diff"]
    assert tab.run("document.querySelector('.lr-flow').dataset.highlighted") == "2"  # embed -> L0H1.v and L0H1 -> L1.mlp.in
    blue, red = tab.run(blue_and_red(".lr-flow-above"))
    assert blue > 20 and red > 20
    tab.move(5, 5)
    assert tab.run(TIP) is None
    assert tab.run(blue_and_red(".lr-flow-above")) == [0, 0]
    tab.close()


def test_hovering_a_flow_edge_tells_its_ends_and_score(browser: Browser, tmp_path: Path) -> None:
    nodes, edges = small_graph()
    view = views.flow_view(nodes, edges, TOKENS, target="logit diff", shown=1)
    tab = browser.open(write(view, tmp_path))
    link = view.layout.links[0]
    source, target = view.layout.marks[link.source], view.layout.marks[link.target]
    (x1, y1), (x2, y2) = curve(source, target)
    x, y = (source.x + 3 * x1 + 3 * x2 + target.x) / 8, (source.y + 3 * y1 + 3 * y2 + target.y) / 8
    left, top, scale = tab.run(
        "(() => { const b = document.querySelector('.lr-flow-stage svg').getBoundingClientRect(); "
        f"return [b.left, b.top, b.width / {view.layout.width}]; }})()"
    )
    tab.move(left + x * scale, top + y * scale)
    assert tab.run(TIP).split("\n") == ["L1.mlp → logits", "from “ time” (4)", "to “ time” (4)", "+1.00 · 50.0 % of logit diff"]
    tab.close()


def test_clicking_a_flow_node_opens_its_edges_readers_and_details(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    tab.click('[data-node="L0H1"]')
    text = tab.run("document.querySelector('.lr-flow-panel').innerText")
    assert "L0H1" in text and "at “ a” (3)" in text and "−25.0 % of logit diff" in text and "name mover" in text
    values = tab.run("[...document.querySelectorAll('.lr-flow-panel td[data-value]')].map((e) => +e.dataset.value)")
    assert values == [0.125, 0.1, -0.2, -0.5, 0.75]  # the reader q, the two sources, the edge in, the edge out
    assert tab.run("document.querySelector('.lr-flow-in td').innerText").strip() == "embed → v at “Once” (1)"
    assert tab.run("document.querySelector('.lr-flow-out td').innerText").strip() == "L1.mlp.in at “ time” (4)"
    tab.click(".lr-flow-out button")  # follows the edge
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == "L1.mlp"
    assert tab.run("document.activeElement.dataset.node") == "L1.mlp"
    tab.click('.lr-flow-panel button[aria-label="close"]')
    assert tab.run("document.querySelector('.lr-flow-panel').hidden") is True
    assert tab.problems() == []
    tab.close()


def test_the_slider_leaves_the_strongest_edges(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    slider = '.lr-flow input[type="range"]'
    inks = []
    for value, count in ((1000, 6), (0, 1)):
        tab.set_slider(slider, value)
        assert tab.run("document.querySelector('.lr-flow').dataset.shown") == str(count)
        inks.append(tab.run(blue_and_red(".lr-flow-base")))
    assert tab.run("document.querySelector('.lr-flow-count').textContent") == "1 of 6, |score| ≥ 1.00"
    assert inks[1][0] < inks[0][0] and inks[1][1] == 0 < inks[0][1]  # the one that stays is positive
    tab.click('[data-node="L0H1"]')  # an opened node shows its edges all the same
    assert tab.run("document.querySelector('.lr-flow').dataset.highlighted") == "2"
    tab.close()


def test_the_search_finds_a_head_and_opens_it(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    faint = "[...document.querySelectorAll('.lr-node:not(.lr-faint)')].map((e) => e.dataset.node).sort()"
    hits = "document.querySelector('.lr-flow-hits').textContent"
    tab.click('.lr-flow input[type="search"]')
    tab.type("l0h1")
    assert tab.run(faint) == ["L0H1"] and tab.run(hits) == "1 node"  # a whole name, not the beginning of L0H10
    tab.press("Enter")
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == "L0H1"
    tab.click('.lr-flow input[type="search"]')
    tab.press("Escape")
    assert tab.run(hits) == "" and len(tab.run(faint)) == 6
    tab.type("L0")
    assert tab.run(faint) == ["L0H1", "L0H10"] and tab.run(hits) == "2 nodes"
    tab.type("x")
    assert tab.run(faint) == [] and tab.run(hits) == "none"
    tab.press("Enter")
    assert tab.problems() == []
    tab.close()


def test_the_flow_is_used_by_keyboard_alone(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    focused = "document.activeElement.dataset.node"
    for _ in range(12):
        tab.press("Tab")
        if tab.run(focused):
            break
    assert tab.run(focused) == "embed"  # the first node is the one way in
    assert tab.run(TIP).split("\n")[0] == "embed"
    assert "embed at “Once” (1), +0.250" in tab.run("document.activeElement.getAttribute('aria-label')")
    tab.press("ArrowUp")
    assert tab.run(focused) == "L0H1"
    tab.press("ArrowRight")
    assert tab.run(focused) == "L0H10"
    tab.press("ArrowUp")
    assert tab.run(focused) == "L1H1"
    tab.press("Enter")
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == "L1H1"
    tab.press("Escape")
    assert tab.run("document.querySelector('.lr-flow-panel').hidden") is True and tab.run(focused) == "L1H1"
    assert tab.run("document.querySelectorAll('.lr-node[tabindex=\"0\"]').length") == 1
    assert tab.problems() == []
    tab.close()


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_flow_can_be_saved(browser: Browser, flow_page: Path, tmp_path: Path, kind: str) -> None:
    tab = browser.open(flow_page)
    tab.allow_downloads(tmp_path)
    tab.click(f'.lr-flow button[aria-label="save as {kind.upper()}"]')
    tab.wait("document.querySelector('.lr-flow').dataset.saved")
    saved = tmp_path / f"flow.{kind}"
    end = time.monotonic() + 20
    while not (saved.exists() and saved.stat().st_size):
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.05)
    content = saved.read_bytes()
    if kind == "svg":
        assert content.count(b'fill="none"') == 4 and content.count(b'stroke="#b2182b"') == 1  # the edges shown, one negative
        assert b"logits" in content and b"upon" in content
    else:
        assert content.startswith(b"\x89PNG")
    assert tab.problems() == []
    tab.close()


def test_five_hundred_nodes_and_five_thousand_edges_stay_fluid(browser: Browser, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tokens = [f" token{i}" for i in range(20)]
    nodes = pd.DataFrame([{"node": f"L{i // 20 % 12}H{i // 240}", "position": i % 20, "score": rng.normal()} for i in range(500)])
    picks = rng.integers(len(nodes), size=(40_000, 2))
    layer = nodes["node"].str.extract(r"L(\d+)")[0].astype(int).to_numpy()
    position = nodes["position"].to_numpy()
    picks = np.unique(picks[(layer[picks[:, 0]] < layer[picks[:, 1]]) & (position[picks[:, 0]] <= position[picks[:, 1]])], axis=0)[:5000]
    edges = pd.DataFrame(
        {
            "source": nodes["node"].to_numpy()[picks[:, 0]],
            "target": nodes["node"].to_numpy()[picks[:, 1]],
            "source_position": position[picks[:, 0]],
            "position": position[picks[:, 1]],
            "score": rng.standard_t(2, size=len(picks)),
        }
    )
    assert len(edges) == 5000
    path = write(views.flow_view(nodes, edges, tokens, shown=5000), tmp_path)
    assert path.stat().st_size < 3_000_000
    tab = browser.open(path)
    drawn = "+document.querySelector('.lr-flow').dataset.drawn"
    assert tab.run(drawn) == 5000
    # What a frame costs is the number of curves it draws: few while the slider moves, those of one node while the pointer does.
    frames = """new Promise((done) => {
      const slider = document.querySelector('.lr-flow input[type="range"]'), marks = [...document.querySelectorAll('.lr-node')];
      const flow = document.querySelector('.lr-flow'), times = [], drawn = [];
      let last = performance.now(), i = 0;
      const frame = () => {
        const now = performance.now(); times.push(now - last); last = now;
        drawn.push(+(MODE === 'slider' ? flow.dataset.drawn : flow.dataset.highlighted));
        if (MODE === 'slider') { slider.value = 850 + (i * 37) % 150; slider.dispatchEvent(new Event('input')); }
        else marks[(i * 7) % marks.length].dispatchEvent(new PointerEvent('pointerenter'));
        if ((i += 1) < 40) requestAnimationFrame(frame); else done([times.sort((a, b) => a - b)[20], Math.max(...drawn.slice(2))]);
      };
      requestAnimationFrame(frame); })"""
    measured = {mode: tab.run(frames.replace("MODE", f"'{mode}'")) for mode in ("slider", "hover")}
    print(f"median frame time in ms without a GPU, most curves in a frame: {measured}")
    assert measured["slider"][1] == 1200 and 0 < measured["hover"][1] < 100
    tab.set_slider('.lr-flow input[type="range"]', 1000)
    tab.wait(f"{drawn} === 5000")  # once the slider rests
    assert tab.problems() == []
    tab.close()


# ---- the page around the views


def test_a_whole_page_reads_and_prints(browser: Browser, tmp_path: Path) -> None:
    page = Page("Report", "All of it").heading("Views").prose("What `L0H1` does.\n\nAnd **more**.").facts({"model": "m", "seconds": 1.25})
    for view in example_views(TOKENS).values():
        page.view(view, "a caption")
    frame = pd.DataFrame({"head": ["L0H0", "L1H1"], "score": [0.5, -1.5]})
    page.heading("Tables").table(frame, bars=["score"]).heading("More").details("all heads", frame)
    path = write(page, tmp_path)
    assert path.stat().st_size < 3_000_000
    tab = browser.open(path, dark=True)
    assert tab.run("document.querySelectorAll('nav a').length") == 3
    assert tab.run("[...document.querySelectorAll('nav a')].every((a) => document.getElementById(a.getAttribute('href').slice(1)))")
    assert tab.run("[...document.querySelectorAll('main > .lr-table td[data-value]')].map((e) => +e.dataset.value)") == [0.5, -1.5]
    tab.print_media()
    assert rgb(tab.run("getComputedStyle(document.body).backgroundColor")).mean() == 255  # paper is white, also in the dark
    # Interactive pictures give way to their static twins.
    assert tab.run("[...document.querySelectorAll('.lr-flow, .lr-circuitsvis')].every((e) => getComputedStyle(e).display === 'none')")
    assert tab.run("[...document.querySelectorAll('.lr-on-paper')].filter((e) => e.getBoundingClientRect().width > 100).length") == 5
    assert tab.problems() == []
    tab.close()
