"""Every kind of page in a real headless browser: no error, no request, and hover, click, slider, search and keys do what they say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analyses import views
from analyses.views import scripts
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
    tab.fits(390)  # nothing sticks out sideways
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
    left, right = "[0].getBoundingClientRect().right", "[1].getBoundingClientRect().left"
    labels = "document.querySelectorAll('.lr-circuitsvis h4')"
    assert tab.run(f"{labels}{left} < {labels}{right}")  # one name does not lie over the next
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
