"""Tables of docs/measurements are what their commands find, and figures that are quoted stand on the pages that are cited."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.benchmarks import bracketing, circuits, compared, contexts, edge_stability, flow_routes, peers, reliability_table
from analyses.benchmarks.tables import markdown, read_table, write_table
from analyses.evaluation.comparison import compare, compare_with_patching
from analyses.graph import flow_graphs
from analyses.models.loading import load_model
from analyses.patching import activation_patching
from analyses.tasks import TASKS
from analyses.vision_language import FOLDER
from analyses.vision_language.short_table import PLACE, short
from lens_relevance import RelevanceError

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "measurements"
QUOTING = [ROOT / "README.md", ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
GEMMA = "LENS_RELEVANCE_GEMMA"
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d*\.\d+(?![\w.]*\d)")

# Pages that one command writes whole, and those that tests of their own compare with a fresh run.
WHOLE = {
    "attacks.md": "tests.attacks",
    "estimates.md": "analyses.benchmarks.estimates",
    "evaluation.md": "analyses.benchmarks.evaluation",
    "families.md": "analyses.benchmarks.families",
    "knowledge_neurons.md": "analyses.benchmarks.knowledge_neurons",
    "known_roles.md": "analyses.known_roles",
    "long_contexts.md": "analyses.benchmarks.long_contexts",
    "released.md": "analyses.benchmarks.families --released",
    "single_prompts.md": "analyses.benchmarks.single_prompts_table",
}
# Pages whose tables are put together from what their commands print. No other page may be.
PRINTED = {
    "costs.md": "analyses.benchmarks.costs",
    "features.md": "analyses.benchmarks.features",
    "mutations.md": "tests.mutation",
}


def test_every_table_comes_from_a_command() -> None:
    for page in sorted(PAGES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if command := (WHOLE | PRINTED).get(page.name):
            assert command in text, (page.name, command)
            continue
        outside = re.sub(r"<!-- table: .*?<!-- end -->", "", text, flags=re.DOTALL)
        assert not re.search(r"^\|.*\|$", outside, flags=re.MULTILINE), f"{page.name} has a table that no command writes"
        assert "<!-- table: " in text and not re.search(r"<!-- table: [^>]*-->\s*<!-- end -->", text), f"{page.name} has an empty place"


def of_bracketing() -> dict[str, str]:
    frame = bracketing.summary(bracketing.of_random_weights("mixtral", 8)).set_index("chain")
    return frame.loc["expert", ["median", "largest"]].to_dict()


def of_heads() -> dict[str, str]:
    model = load_model("embedded")
    pairs = TASKS["induction"](model, n=64, seed=0)
    found = compared.shown(compare_with_patching(model, pairs, ["relp"], components=["heads"]))
    return found.set_index("method").loc["`relp`"].drop("component").to_dict()


def of_edge_stability() -> dict[str, str]:
    row = edge_stability.row_of(load_model("embedded"), "gradient", "ioi", draws=6, n=16)
    return {name: str(value) for name, value in row.items() if name.startswith(("top", "passes"))}


def of_circuits() -> dict[str, str]:
    found = circuits.cmd(load_model("embedded"), "ioi", ("relp",), level="node", n=16, seeds=2)
    return {"CMD, nodes": str(circuits.shown({"node": found})["CMD, nodes"][0])}


def of_gemma() -> dict[str, str]:
    if not os.environ.get(GEMMA):
        pytest.skip(f"needs Gemma 3 270M: {GEMMA} names no folder")
    model = load_model(os.environ[GEMMA])
    found = compare_with_patching(model, TASKS["ioi"](model, n=16, seed=0), ["relp"], components=["heads"])
    return compared.shown(found).set_index("method").loc["`relp`"].drop("component").to_dict()


def of_contexts() -> dict[str, str]:
    model = load_model("embedded")
    texts = contexts.known_sentences(model)
    found, _, _ = contexts.measured(model, texts, neurons=40, n_windows=32, window=12, rules="attnlrp", seed=0)
    return contexts.shown(found).set_index("measure").loc["relevance"].to_dict()


def of_flow_routes() -> dict[str, str]:
    model = load_model("embedded")
    pairs, names = flow_routes.PAIRS["ioi"](model, 8), flow_routes.head_names(model)
    graphs = flow_graphs(model, pairs.clean, pairs.target, reference=pairs.corrupt)
    patched = activation_patching(model, pairs, ["heads"], direction="mean", progress=False).effect.double().numpy()
    found = flow_routes.compared({"patching": patched, flow_routes.AGAINST: flow_routes.head_scores(graphs, names)})
    return found.set_index("graph").loc[flow_routes.AGAINST].to_dict()


def of_reliability() -> dict[str, str]:
    model = load_model("embedded")
    found = compare(model, TASKS["ioi"](model, n=32, seed=0), ["combined", "relp"], components=["heads"])
    rows = pd.DataFrame(reliability_table.measured(found)).assign(task="ioi", seed=0)
    return reliability_table.shown(rows).iloc[0].drop(["task", "component"]).to_dict()


def of_peers() -> dict[str, str]:
    """Without the authors' code: on this page ours has a correlation of 1.000000 with it, and so takes its place."""
    shape = peers.SHAPES[FIRST]
    model, picture = peers.build(shape, 0), peers.a_picture(shape, 0)
    label = int(model(picture, return_type="logits").argmax())
    found = {rules: peers.scores(model, picture, label, rules) for rules in peers.RULES}
    ours = found.pop("lrp_zplus")
    return {f"Pearson, `{rules}`": f"{torch.corrcoef(torch.stack([ours, scores]))[0, 1]:.2f}" for rules, scores in found.items()}


FIRST = next(iter(peers.SHAPES))
CELLS: dict[tuple[str, str, str], Callable[[], dict[str, str]]] = {
    ("bracketing.md", "tiny mixtral, random weights", "expert"): of_bracketing,
    ("heads_against_patching.md", "embedded, induction, heads", "heads `relp`"): of_heads,
    ("edge_stability.md", "embedded, ioi", "`gradient`"): of_edge_stability,
    ("circuits.md", "embedded, ioi", "`relp`"): of_circuits,
    ("gemma_ioi.md", "gemma3-270m, ioi, resid,attn,mlp,heads", "heads `relp`"): of_gemma,
    ("contexts.md", "embedded", "relevance"): of_contexts,
    ("flow_routes.md", "embedded, ioi", flow_routes.AGAINST): of_flow_routes,
    ("reliability.md", "embedded", "ioi heads"): of_reliability,
    ("peers.md", "chefer_2021a", f"{FIRST} 0"): of_peers,
}


@pytest.mark.parametrize("cell", CELLS, ids=[page for page, *_ in CELLS])
def test_a_cell_measured_again_is_what_the_page_has(cell: tuple[str, str, str]) -> None:
    page, table, row = cell
    shown = read_table(PAGES / page, table)
    for second in {"component": ["method"], "task": ["component"], "model": ["seed"]}.get(str(shown.index.name), []):
        shown.index = shown.index + " " + shown[second]  # what names a row stands in two columns
    found = CELLS[cell]()
    assert found
    for column, fresh in found.items():
        here, there = numbers(shown.loc[row, column]), numbers(str(fresh))
        assert len(here) == len(there) and here == pytest.approx(there, abs=0.002), (column, shown.loc[row, column], fresh)


def test_the_tables_of_reliability_are_those_of_the_rows_kept() -> None:
    page = (PAGES / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"<!-- table: (.*?) -->", page)
    tables = reliability_table.tables(PAGES / "results")
    assert len(named) == 7
    for name in named:
        assert markdown(tables[name][0]) in page, name


def test_a_row_that_is_measured_again_takes_the_place_of_the_earlier_one(tmp_path: Path) -> None:
    key, file = ["task", "component"], tmp_path / "new" / "rows.csv"
    reliability_table.keep([{"task": "b", "component": "q", "pearson": 0.5}, {"task": "a", "component": "q", "pearson": 0.25}], file, key)
    reliability_table.keep([{"task": "b", "component": "q", "pearson": 0.75}], file, key)
    assert pd.read_csv(file).to_dict("list") == {"task": ["a", "b"], "component": ["q", "q"], "pearson": [0.25, 0.75]}


def test_the_short_table_of_pictures_is_that_of_the_results() -> None:
    """tests/analyses/test_vision_language.py measures two of these again."""
    written = markdown(short(pd.read_csv(FOLDER / "results.csv")))
    assert written in (PAGES / "pictures_and_questions.md").read_text(encoding="utf-8") and written.count("\n") == 12
    assert read_table(PAGES / "pictures_and_questions.md", PLACE).loc["random", "localisation"] == "0.13 (0.13 to 0.14)"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d*\.?\d+", text.replace("−", "-"))]


def quoted(text: str) -> list[str]:
    """Numbers with a fraction, without code, links and the numbers of papers."""
    return [n.replace("−", "-") for n in NUMBER.findall(re.sub(r"arXiv [\d.]+|\]\([^)]*\)|`[^`]*`", "", text))]


def stands_in(number: str, page: str) -> bool:
    """Whether a page has a number that is this one, rounded to as many digits."""
    digits = len(number.split(".")[1])
    known = [n.replace("−", "-") for n in NUMBER.findall(page)]
    return any(abs(round(float(n), digits) - float(number)) < 1e-9 for n in known if len(n.split(".")[1]) >= digits)


def not_on_the_pages_cited(text: str, folder: Path) -> list[str]:
    """Numbers of sections (`## ...`) that cite pages of measurements, and are on none of the pages that their section cites."""
    missing = []
    for section in re.split(r"\n(?=## )", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        cited = {target for target in re.findall(r"\]\(([^)#]+\.md)", section) if "measurements/" in target or "results.md" in target}
        pages = "\n".join((folder / target).read_text(encoding="utf-8") for target in sorted(cited))
        missing += [number for number in quoted(section) if cited and not stands_in(number, pages)]
    return missing


@pytest.mark.parametrize("page", QUOTING, ids=[page.name for page in QUOTING])
def test_figures_that_are_quoted_stand_on_the_pages_cited(page: Path) -> None:
    assert not not_on_the_pages_cited(page.read_text(encoding="utf-8"), page.parent)


def test_the_readme_s_table_is_that_of_gemma() -> None:
    lines = re.findall(r"^\| `(\w+)` \| (.*?) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    page = read_table(PAGES / "gemma_ioi.md", "gemma3-270m, ioi, resid,attn,mlp,heads").reset_index().set_index(["component", "method"])
    compared_there = 0
    for method, cells in lines:
        for component, cell in zip(("resid", "attn", "mlp", "heads"), cells.split(" | "), strict=False):
            if ("resid", f"`{method}`") in page.index:
                row = page.loc[(component, f"`{method}`")]
                there = [numbers(row[column])[0] for column in ("Pearson (95 %)", "Spearman (95 %)")]
                assert numbers(cell) == pytest.approx(there, abs=0.0006), (method, component)
                compared_there += 1
    assert compared_there == 32


def test_what_stands_in_a_page_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table: one -->\nold | 1 |\n<!-- end -->\nbetween\n<!-- table: two -->\n<!-- end -->\nafter\n", encoding="utf-8"
    )
    with pytest.raises(RelevanceError, match="has no table"):
        read_table(page, "two")
    table = "| a | b |\n|---|---|\n| x | 0.5 |"
    write_table(page, "two", table, command="analyses.benchmarks.two --n 1", settings="of nothing")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table: one -->\nold | 1 |\n<!-- end -->\nbetween\n") and text.endswith("<!-- end -->\nafter\n")
    assert "python -m analyses.benchmarks.two --n 1" in text and "of nothing; 20" in text
    assert read_table(page, "two").loc["x", "b"] == "0.5" and markdown(read_table(page, "two").reset_index()) == table
    with pytest.raises(RelevanceError, match="needs one pair of lines"):
        write_table(page, "three", table, command="", settings="")


def test_a_figure_that_no_page_has_is_found(tmp_path: Path) -> None:
    (tmp_path / "measurements").mkdir()
    (tmp_path / "measurements" / "a.md").write_text("| x | .981 | -0.4567 |", encoding="utf-8")
    section = "## One\n[here](measurements/a.md): .98, −.457, `0.1`, arXiv 2402.05602, and .983.\n## Two\nwithout a page .123"
    assert not_on_the_pages_cited(section, tmp_path) == [".983"]
