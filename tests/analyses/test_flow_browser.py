"""The flow view in a real headless browser: what is in sight, and slider, zoom, drag, pins, groups, paths, keys and files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analyses import views
from analyses.graph import FlowGraph
from analyses.views.flow_layout import curve, place
from analyses.views.flow_static import drawn_marks
from analyses.views.markup import show_token
from tests.analyses.browser import Browser, Tab, headless_chromium
from tests.analyses.test_flow_view import GEMMA
from tests.analyses.test_views import TOKENS
from tests.analyses.test_views_browser import TIP, write

SLIDER = '.lr-flow input[type="range"]'
ROOT = "document.querySelector('.lr-flow')"
SHOWN = "[...document.querySelectorAll('.lr-flow-stage .lr-node')]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_chromium() as started:
        yield started


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
    return write(views.flow_view(nodes, edges, TOKENS, target="logit diff", shown=6), tmp_path)


@pytest.fixture
def gemma_page(tmp_path: Path) -> Path:
    return write(FlowGraph.from_json(GEMMA).show(), tmp_path)


def blue_and_red(canvas: str) -> str:
    """JavaScript: coloured pixels of a canvas."""
    return f"""(() => {{ const c = document.querySelector('{canvas}');
      const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      let blue = 0, red = 0; for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 20) {{
        if (d[i + 2] > d[i] + 30) blue += 1; else if (d[i] > d[i + 2] + 30) red += 1; }} return [blue, red]; }})()"""


def drawn(tab: Tab) -> list[list[Any]]:
    return tab.run(f"{SHOWN}.map((e) => [e.dataset.node, +e.dataset.position, +e.dataset.score])")  # type: ignore[no-any-return]


# ---- what is in sight


def test_tokens_logits_and_the_strongest_paths_are_in_sight_on_opening(browser: Browser, gemma_page: Path) -> None:
    tab = browser.open(gemma_page, width=1280, height=900)
    paths = tab.run("document.querySelector('.lr-view').lensRelevance.paths.slice(0, 5).map((p) => p.nodes)")
    nodes = tab.run("document.querySelector('.lr-view').lensRelevance.nodes.map((n) => [n.name, n.position])")
    boxes = {
        (name, position): box
        for name, position, *box in tab.run(
            f"{SHOWN}.map((e) => {{ const b = e.querySelector('.lr-mark').getBoundingClientRect(); "
            "return [e.dataset.node, +e.dataset.position, b.left, b.top, b.right, b.bottom]; })"
        )
    }
    wanted = {tuple(nodes[i]) for path in paths for i in path}
    assert len(wanted) >= 8 and ("embed", 10) in wanted and ("logits", 14) in wanted and ("L3.mlp", 10) in wanted
    for left, top, right, bottom in (boxes[node] for node in wanted):
        assert 0 <= left < right <= 1280 and 0 <= top < bottom <= 900
    labels = tab.run("[...document.querySelectorAll('.lr-flow-tokens span')].map((e) => [e.textContent, e.getBoundingClientRect().bottom])")
    assert ["<bos>", "John", "to"] == [labels[0][0], labels[10][0], labels[-1][0]] and all(0 < bottom <= 900 for _, bottom in labels)
    tab.fits(1280)
    assert tab.problems() == []
    tab.close()


def test_the_browser_places_everything_where_the_static_picture_does(browser: Browser, gemma_page: Path) -> None:
    tab = browser.open(gemma_page)
    flow = FlowGraph.from_json(GEMMA).show().flow
    for n in (5, 40, len(flow.links)):
        tab.set_slider(SLIDER, 1000 * np.log(n) / np.log(len(flow.links)))
        tab.wait(f"Math.abs(+{ROOT}.dataset.shown - {flow.shown(n)}) < 4")
        tab.wait("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
        shown = int(tab.run(f"{ROOT}.dataset.shown"))
        marks = drawn_marks(flow, shown)
        width, height = tab.run("(() => { const s = document.querySelector('.lr-flow-stage'); return [s.clientWidth, s.clientHeight]; })()")
        expected = place(flow.marks, marks, [show_token(t) for t in flow.tokens], width=width, height=height)
        matrix = "e.transform.baseVal.consolidate().matrix"
        place_of = f"(e) => [e.dataset.node, +e.dataset.position, {matrix}.e, {matrix}.f]"
        found = tab.run(f"{SHOWN}.map({place_of})")
        assert len(found) == len(marks)
        at = {(flow.marks[i].name, flow.marks[i].position): expected.marks[i] for i in marks}
        for name, position, x, y in found:
            assert (x, y) == pytest.approx(at[name, position][:2], abs=0.01), name
        rows = tab.run("[...document.querySelectorAll('.lr-flow-rows span')].map((e) => e.textContent)")
        assert rows == [row.name for row in expected.rows]
    tab.close()


@pytest.mark.parametrize("asked", [1, 10, 50])
def test_after_the_slider_no_node_is_drawn_without_a_connection(browser: Browser, gemma_page: Path, asked: int) -> None:
    tab = browser.open(gemma_page)
    total = tab.run("document.querySelector('.lr-view').lensRelevance.edges.length")
    tab.set_slider('.lr-flow input[type="range"]', 1000 * np.log(asked) / np.log(total))
    tab.wait("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    shown = int(tab.run(f"{ROOT}.dataset.shown"))
    assert asked - 3 <= shown < asked + 12
    edges = tab.run(f"document.querySelector('.lr-view').lensRelevance.edges.slice(0, {shown})")
    nodes = tab.run("document.querySelector('.lr-view').lensRelevance.nodes.map((n) => [n.name, n.position, n.kind])")
    ends = {end for edge in edges for end in edge[:2]}
    assert sorted((name, position) for name, position, _ in drawn(tab)) == sorted((nodes[i][0], nodes[i][1]) for i in ends)
    into, out = {edge[1] for edge in edges}, {edge[0] for edge in edges}
    assert all((i in into or nodes[i][2] == "embed") and (i in out or nodes[i][2] == "logits") for i in ends)
    tab.close()


def test_flow_nodes_carry_the_scores_given(browser: Browser, flow_page: Path) -> None:
    nodes, edges = small_graph()
    tab = browser.open(flow_page)
    assert sorted(drawn(tab)) == sorted(nodes[nodes["node"] != "L0H1.q"][["node", "position", "score"]].to_numpy().tolist())
    held = tab.run("document.querySelector('.lr-view').lensRelevance.edges.map((e) => e[2])")
    assert sorted(held) == sorted(edges["score"])
    assert held[:3] == [1.0, 0.75, -0.5]  # the strongest path, embed -> L0H1 -> L1.mlp -> logits, comes first
    assert tab.run("document.querySelector('.lr-flow-count').textContent") == "6 of 6"
    assert tab.problems() == []
    tab.close()


def middles(tab: Tab, view: Any, shown: int) -> list[list[float]]:
    """The middle of each curve in pixels of the stage."""
    width, height = tab.run("(() => { const s = document.querySelector('.lr-flow-stage'); return [s.clientWidth, s.clientHeight]; })()")
    flow = view.flow
    placed = place(flow.marks, drawn_marks(flow, shown), [show_token(t) for t in flow.tokens], width=width, height=height)
    found = []
    for link in flow.links[:shown]:
        source, target = placed.marks[link.source][:2], placed.marks[link.target][:2]
        (x1, y1), (x2, y2) = curve(source, target)
        found.append([(source[0] + 3 * x1 + 3 * x2 + target[0]) / 8, (source[1] + 3 * y1 + 3 * y2 + target[1]) / 8])
    return found


def test_flow_edges_are_drawn_where_the_layout_says(browser: Browser, tmp_path: Path) -> None:
    """The curves of the page and of the static picture are the same: the canvas is inked at their middles, in the colour of the sign."""
    nodes, edges = small_graph()
    view = views.flow_view(nodes, edges, TOKENS, shown=6)
    tab = browser.open(write(view, tmp_path))
    probe = f"""(() => {{ const c = document.querySelector('.lr-flow-base');
      const k = c.width / document.querySelector('.lr-flow-stage').clientWidth;
      const around = ([x, y]) => [...c.getContext('2d').getImageData(Math.round(x * k) - 1, Math.round(y * k) - 1, 3, 3).data];
      return {json.dumps(middles(tab, view, 6))}.map(around); }})()"""
    for link, pixels in zip(view.flow.links, tab.run(probe), strict=True):
        red, _, blue, alpha = max(np.reshape(pixels, (9, 4)).tolist(), key=lambda pixel: pixel[3])
        assert alpha > 30, link
        assert (blue > red) == (link.score > 0), link
    tab.close()


# ---- pointing and opening


def test_hovering_a_flow_node_tells_component_token_and_share(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    tab.hover('[data-node="L0H1"]')
    assert tab.run(TIP).split("\n") == ["L0H1", "at “ a” (3)", "−0.500 · −25.0 % of logit diff"]
    assert tab.run(f"{ROOT}.dataset.highlighted") == "2"  # embed -> L0H1.v and L0H1 -> L1.mlp.in
    blue, red = tab.run(blue_and_red(".lr-flow-above"))
    assert blue > 20 and red > 20
    tab.move(5, 5)
    assert tab.run(TIP) is None
    assert tab.run(blue_and_red(".lr-flow-above")) == [0, 0]
    tab.close()


def test_where_a_patched_effect_is_expected_is_told_beside_the_score(browser: Browser, tmp_path: Path) -> None:
    nodes, edges = small_graph()
    known = nodes["node"].isin(["L0H1", "L1.mlp"])
    nodes = nodes.assign(
        low=nodes["score"].where(known) - 0.25, high=nodes["score"].where(known) + 0.25, reliable=nodes["node"] == "L1.mlp"
    )
    tab = browser.open(write(views.flow_view(nodes, edges, TOKENS, target="logit diff", shown=6), tmp_path))
    tab.hover('[data-node="L0H1"]')
    assert tab.run(TIP).split("\n")[2:] == ["−0.500 · −25.0 % of logit diff", "patched: −0.750 to −0.250, unsure"]
    tab.click('[data-node="L0H1"]')
    assert "patched: −0.750 to −0.250, unsure" in tab.run("document.querySelector('.lr-flow-panel').innerText")
    tab.click(".lr-flow-out button")
    text = tab.run("document.querySelector('.lr-flow-panel').innerText")
    assert "patched: " in text and "unsure" not in text
    tab.close()


def test_hovering_a_flow_edge_tells_its_ends_and_score(browser: Browser, tmp_path: Path) -> None:
    nodes, edges = small_graph()
    view = views.flow_view(nodes, edges, TOKENS, target="logit diff", shown=6)
    tab = browser.open(write(view, tmp_path))
    link = next(i for i, link in enumerate(view.flow.links) if link.score == -0.5)
    x, y = middles(tab, view, 6)[link]
    left, top = tab.run("(() => { const b = document.querySelector('.lr-flow-stage').getBoundingClientRect(); return [b.left, b.top]; })()")
    tab.move(left + x, top + y)
    assert tab.run(TIP).split("\n") == ["embed → L0H1 (value)", "from “Once” (1)", "to “ a” (3)", "−0.500 · −25.0 % of logit diff"]
    tab.close()


def test_clicking_a_flow_node_opens_its_edges_readers_and_details(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    tab.click('[data-node="L0H1"]')
    text = tab.run("document.querySelector('.lr-flow-panel').innerText")
    assert "L0H1" in text and "at “ a” (3)" in text and "−25.0 % of logit diff" in text and "name mover" in text
    values = tab.run("[...document.querySelectorAll('.lr-flow-panel td[data-value]')].map((e) => +e.dataset.value)")
    assert values == [0.125, 0.1, -0.2, -0.5, 0.75]  # the query, the two sources, the edge in, the edge out
    assert tab.run("document.querySelector('.lr-flow-in td').innerText").strip() == "embed → value at “Once” (1)"
    assert tab.run("document.querySelector('.lr-flow-out td').innerText").strip() == "L1.mlp (input) at “ time” (4)"
    tab.click(".lr-flow-out button")  # follows the edge
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == "L1.mlp"
    assert tab.run("document.activeElement.dataset.node") == "L1.mlp"
    tab.click('.lr-flow-panel button[aria-label="close"]')
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == ""
    assert tab.problems() == []
    tab.close()


def test_a_path_is_chosen_from_the_list(browser: Browser, gemma_page: Path) -> None:
    tab = browser.open(gemma_page)
    first = tab.run("document.querySelector('.lr-flow-paths button').textContent")
    assert first == "embed “ John” → L3.mlp → L11H3 (value of “ John”) → logits"
    tab.set_slider('.lr-flow input[type="range"]', 0)
    tab.click(".lr-flow-paths li:nth-child(3) button")
    path = tab.run("document.querySelector('.lr-view').lensRelevance.paths[2]")
    assert tab.run(f"{ROOT}.dataset.highlighted") == str(len(path["edges"]))
    names = tab.run("document.querySelector('.lr-view').lensRelevance.nodes.map((n) => n.name)")
    assert {names[i] for i in path["nodes"]} <= {name for name, *_ in drawn(tab)}  # the slider gave way
    assert tab.run("document.querySelectorAll('.lr-flow-paths li.lr-chosen').length") == 1
    tab.click(".lr-flow-paths li.lr-chosen button")
    tab.move(5, 5)
    assert tab.run(f"{ROOT}.dataset.highlighted") == "0"
    assert tab.problems() == []
    tab.close()


# ---- slider, search, keys


def test_the_slider_leaves_the_strongest_path(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    slider, inks = '.lr-flow input[type="range"]', []
    for value, count in ((1000, 6), (0, 3)):
        tab.set_slider(slider, value)
        tab.wait(f"{ROOT}.dataset.drawn === '{count}'")
        assert tab.run(f"{ROOT}.dataset.shown") == str(count)
        inks.append(tab.run(blue_and_red(".lr-flow-base")))
    assert tab.run("document.querySelector('.lr-flow-count').textContent") == "3 of 6"  # one path, whole
    assert sorted(name for name, *_ in drawn(tab)) == ["L0H1", "L1.mlp", "embed", "logits"]
    assert inks[1][0] < inks[0][0] and inks[1][1] > 0
    tab.close()


def test_the_search_finds_a_head_and_opens_it(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    clear = "[...document.querySelectorAll('.lr-node:not(.lr-faint)')].map((e) => e.dataset.node).sort()"
    hits = "document.querySelector('.lr-flow-hits').textContent"
    tab.click('.lr-flow input[type="search"]')
    tab.type("l0h1")
    assert tab.run(clear) == ["L0H1"] and tab.run(hits) == "1 node"  # a whole name, not the beginning of L0H10
    tab.press("Enter")
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == "L0H1"
    tab.click('.lr-flow input[type="search"]')
    tab.press("Escape")
    assert tab.run(hits) == "" and len(tab.run(clear)) == 6
    tab.type("L0")
    assert tab.run(clear) == ["L0H1", "L0H10"] and tab.run(hits) == "2 nodes"
    tab.type("x")
    assert tab.run(clear) == [] and tab.run(hits) == "none"
    tab.press("Enter")
    assert tab.problems() == []
    tab.close()


def test_the_flow_is_used_by_keyboard_alone(browser: Browser, flow_page: Path) -> None:
    tab = browser.open(flow_page)
    focused = "document.activeElement.dataset.node"
    for _ in range(14):
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
    assert tab.run("document.querySelector('.lr-flow-panel').dataset.node") == "" and tab.run(focused) == "L1H1"
    assert tab.run("document.querySelectorAll('.lr-node[tabindex=\"0\"]').length") == 1
    assert tab.problems() == []
    tab.close()


# ---- zoom, drag, pins, groups


def test_wheel_zoom_drag_overview_and_fit(browser: Browser, gemma_page: Path) -> None:
    tab = browser.open(gemma_page)
    zoom, transform = f"+{ROOT}.dataset.zoom", "document.querySelector('.lr-flow-stage svg > g').getAttribute('transform')"
    mark = 'document.querySelector(\'[data-node="L11H3"][data-position="14"] .lr-mark\')'
    middle = f"(() => {{ const b = {mark}.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; }})()"
    box = tab.run(middle)
    assert tab.run(zoom) == 1 and tab.run("document.querySelector('.lr-flow-overview').hidden")
    tab.wheel(*box, -600)
    assert tab.run(zoom) == pytest.approx(np.exp(0.9), abs=0.01)
    after = tab.run(middle)
    assert after == pytest.approx(box, abs=1.5)  # what is under the pointer stays there
    assert not tab.run("document.querySelector('.lr-flow-overview').hidden")
    before = tab.run(transform)
    tab.drag((400, 420), (460, 470))
    assert tab.run(transform) != before
    tab.click(".lr-flow-overview")
    tab.click('.lr-flow button[aria-label="show all of it"]')
    assert tab.run(zoom) == 1 and tab.run("document.querySelector('.lr-flow-overview').hidden")
    tab.click('.lr-flow button[aria-label="larger"]')
    assert tab.run(zoom) == 1.25
    assert tab.problems() == []
    tab.close()


def test_a_pinned_node_stays_when_the_slider_would_hide_it(browser: Browser, gemma_page: Path) -> None:
    tab = browser.open(gemma_page)
    there = f"{SHOWN}.some((e) => e.dataset.node === 'L5H2')"
    tab.click('[data-node="L5H2"]')
    tab.click('.lr-flow-panel button[aria-label="keep this node in sight and named"]')
    tab.press("Escape")
    tab.set_slider('.lr-flow input[type="range"]', 0)
    tab.wait(f"+{ROOT}.dataset.nodes < 10")
    assert tab.run(there)
    assert tab.run("document.querySelector('[data-node=\"L5H2\"] text').textContent") == "L5H2"
    kept = tab.run("JSON.parse(decodeURIComponent(location.hash.slice(6)))")
    assert len(kept["pinned"]) == 1
    tab.reload()  # the page's address keeps it
    assert tab.run(there) and tab.run("document.querySelectorAll('.lr-node.lr-pinned').length") == 1
    tab.close()


def test_nodes_are_grouped_and_taken_apart_again(browser: Browser, gemma_page: Path) -> None:
    tab = browser.open(gemma_page)
    before = int(tab.run(f"{ROOT}.dataset.nodes"))
    for name in ("L15H1", "L15H3"):
        node = f'document.querySelector(\'[data-node="{name}"][data-position="14"]\')'
        tab.run(f"{node}.dispatchEvent(new MouseEvent('click', {{ shiftKey: true, bubbles: true }}))")
    assert tab.run("document.querySelectorAll('.lr-node.lr-selected').length") == 2
    tab.click('.lr-flow-panel button[aria-label="draw the selected nodes as one"]')
    assert int(tab.run(f"{ROOT}.dataset.nodes")) == before - 1
    assert tab.run("document.querySelector('.lr-node.lr-group text').textContent") == "group 1"
    tab.click(".lr-node.lr-group")
    assert "2 nodes" in tab.run("document.querySelector('.lr-flow-panel').innerText")
    tab.click('.lr-flow-panel button[aria-label="take the group apart"]')
    assert int(tab.run(f"{ROOT}.dataset.nodes")) == before
    assert tab.problems() == []
    tab.close()


# ---- files


@pytest.mark.parametrize("kind", ["svg", "png", "json"])
def test_the_flow_can_be_saved_with_what_it_shows(browser: Browser, gemma_page: Path, tmp_path: Path, kind: str) -> None:
    tab = browser.open(gemma_page)
    tab.allow_downloads(tmp_path)
    tab.click(f'.lr-flow button[aria-label="save as {kind.upper()}"]')
    tab.wait(f"{ROOT}.dataset.saved")
    saved = tmp_path / f"flow.{kind}"
    end = time.monotonic() + 20
    while not (saved.exists() and saved.stat().st_size):
        assert time.monotonic() < end, "nothing was saved"
        time.sleep(0.05)
    content = saved.read_bytes()
    shown = int(tab.run(f"{ROOT}.dataset.shown"))
    if kind == "svg":
        assert content.count(b'fill="none"') == shown
        assert b"ruleset: deeplift" in content and b"gemma-3-270m" in content and b"<metadata>" in content
    elif kind == "png":
        assert content.startswith(b"\x89PNG")
    else:
        graph = json.loads(content)
        assert graph["info"]["model"] == "gemma-3-270m" and graph["state"]["shown"] == shown
        assert set(graph["edges"][0]) == {"source", "target", "score", "input", "path_strength"}
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
    count = f"+{ROOT}.dataset.drawn"
    assert tab.run(count) == 5000
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
    assert measured["slider"][1] == 600 and 0 < measured["hover"][1] < 100
    tab.set_slider('.lr-flow input[type="range"]', 1000)
    tab.wait(f"{count} === 5000")  # once the slider rests
    assert tab.problems() == []
    tab.close()
