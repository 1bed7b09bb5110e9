"""Cells of the tables of docs/measurements, measured again, and tables that are written from kept rows.

Of tables of times the columns that are none, and that the rows are those that the command writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from analyses.benchmarks import (
    bracketing,
    checks,
    circuits,
    compared,
    contexts,
    edge_stability,
    engine,
    features,
    flow_routes,
    patching,
    peers,
    perturbation,
    real_model,
    reliability_table,
)
from analyses.benchmarks.tables import markdown, read_table
from analyses.benchmarks.tiny_models import FAMILIES, build
from analyses.evaluation.comparison import compare, compare_with_patching
from analyses.graph import flow_graphs
from analyses.models.loading import load_model
from analyses.patching import activation_patching
from analyses.tasks import TASKS
from analyses.vision_language import FOLDER
from analyses.vision_language.short_table import PLACE, short
from tests.mutation import results
from tests.mutation.everything import MUTATIONS
from tests.test_measurements import PAGES, ROOT, numbers

GEMMA = "LENS_RELEVANCE_GEMMA"


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


def of_features() -> dict[str, str]:
    """A pass keeps as many dense tensors on any model."""
    model = load_model("embedded")
    return features.memory(model, TASKS["ioi"](model, n=4, seed=11)).iloc[-1, 1:].to_dict()


def of_costs() -> dict[str, str]:
    """Of the columns the one that is no time."""
    model = engine.gpt2_shape()
    run = engine.cases(model, 4, 64)["`attnlrp`, default names"]
    run()  # a first call compares the model with its sites
    return {"tensors saved, MiB": f"{engine.saved_mebibytes(model, run):.0f}"}


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
    ("features.md", "gemma3-270m, memory", "each layer"): of_features,
    ("costs.md", "engine", "`attnlrp`, default names"): of_costs,
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


def test_rows_of_costs_are_those_that_the_commands_write() -> None:
    page, tiny = PAGES / "costs.md", build("gpt2", torch.float32)

    def rows(name: str) -> list[str]:
        return list(read_table(page, name).index)

    assert rows("engine") == list(engine.cases(tiny, 1, 4)) and rows("real model, gemma3-270m") == list(real_model.cases(tiny, 1, 4))
    for name in ("gemma3-270m", "GPT-2-small shape"):
        table = read_table(page, f"checks, {name}")
        assert [checks.BASE, *table.index] == list(checks.cases(tiny, "attnlrp", batch=1, positions=4))
        assert list(table.columns) == [f"`{rules}`" for rules in checks.RULES]
    for name, sets in (("gemma3-270m", ["in a name"]), ("GPT-2-small shape", ["in one token", "in all tokens"])):
        sweeps = list(patching.SWEEPS)[: 1 if name == "gemma3-270m" else 2]
        table = read_table(page, f"patching, {name}")
        assert list(zip(table.index, table["sweep"], strict=True)) == [(pairs, sweep) for pairs in sets for sweep in sweeps]
    curves = read_table(page, "perturbation, gemma3-270m")["curves"]
    assert curves.to_dict() == dict.fromkeys(perturbation.PROMPTS, str(2 * len(perturbation.BASELINES) * (1 + len(perturbation.METHODS))))
    families = read_table(page, "families")
    assert set(families.index) <= {family.title for family in FAMILIES.values()} and families.index.is_unique and len(families) > 25
    assert {"attnlrp", "deeplift"} <= {name.strip("`") for name in families.columns}
    for width in (96, 768):
        assert rows(f"edges, width {width}") == ["edges", "faithfulness by position"]


def test_the_table_of_mutations_is_that_of_the_rows_kept() -> None:
    file = PAGES / "results" / "mutations.csv"
    assert markdown(results.table(MUTATIONS, file)) in (PAGES / "mutations.md").read_text(encoding="utf-8")
    kept = results.of_the_list(MUTATIONS, file)
    assert set(kept["outcome"]) <= {results.KILLED, results.SURVIVED, results.EQUIVALENT}
    said = {results.identity(mutation) for mutation in MUTATIONS if mutation.equivalent}
    assert said >= set(kept.loc[kept["outcome"] == results.EQUIVALENT, results.KEY].itertuples(index=False, name=None))
    for test in kept.loc[kept["noticed by"] != "", "noticed by"].str.split("::").str[0].unique():
        assert (ROOT / test).is_file(), test


def test_what_was_tried_is_not_tried_again_and_survivors_are(tmp_path: Path) -> None:
    file, (first, second, third, *_) = tmp_path / "rows.csv", MUTATIONS
    results.keep(file, first, results.KILLED, "tests/a.py::test_b")
    results.keep(file, second, results.SURVIVED, "")
    assert results.untried([first, second, third], file) == [second, third]
    results.keep(file, second, results.KILLED, "tests/a.py::test_c")
    assert results.untried([first, second, third], file) == [third]
    assert results.untried([replace(first, new="another")], file)  # written differently, it is another change
    row = results.table([first, second, third], file).set_index("part").loc["all"]
    assert row.to_dict() == {"changes": 3, "tried": 2, "killed": 2, "equivalent": 0, "not noticed": 0}


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
