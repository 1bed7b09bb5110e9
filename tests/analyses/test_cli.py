"""The command line as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner, Result

import lens_relevance
from analyses.circuits import Ablation, read_mib, score_items, to_mib
from analyses.cli import app
from analyses.evaluation.comparison import COLUMNS
from analyses.graph import FlowGraph
from analyses.models.loading import load_model
from analyses.tasks import ioi
from lens_relevance import RelevanceError
from tests.fixtures import STORIES
from tests.models import build_with_words

PROMPT = "When Mary and John went to the store, John gave a drink to"
AGAINST = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command; `sys.argv` too is as typed, since the report shows the command."""
    monkeypatch.setenv("COLUMNS", "160")

    def typed(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["lens-relevance", *arguments])
        return CliRunner().invoke(app, list(arguments))

    return typed


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, analyses.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_public_face_is_there() -> None:
    import analyses

    assert all(getattr(analyses, name) is not None for name in analyses.__all__)
    assert sorted(analyses._HOME) == sorted(analyses.__all__)
    with pytest.raises(AttributeError, match="rank_heds"):
        _ = analyses.rank_heds


@pytest.mark.usefixtures("circuits_of_few_sizes")
def test_report_explains_the_ioi_task(run: Callable[..., Result], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run("report", "--n", "8", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "8 pair(s), heads agree with activation patching to Pearson 0.9" in result.stdout
    page = out.read_text()
    assert "the ioi task" in page and f"lens-relevance report --n 8 --out {out}" in page


def test_explain_shows_words_heads_and_account(run: Callable[..., Result]) -> None:
    result = run("explain", "--prompt", PROMPT, "--answer", "Mary", "--wrong", "John", "--against", AGAINST)
    assert result.exit_code == 0, result.output
    for text in ("logit('Mary') - logit('John')", "against: " + AGAINST, "Words, against the counterpart", "L1H", "Unexplained: at most"):
        assert text in result.stdout, text


def test_explain_a_prompt_alone(run: Callable[..., Result]) -> None:
    result = run("explain", "--prompt", PROMPT, "--rules", "attnlrp")
    assert result.exit_code == 0, result.output
    assert "Words, the prompt on its own" in result.stdout and "softmax" in result.stdout


def test_rank_writes_all_rows(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("rank", "neurons", "--n", "4", "--method", "relp", "--top", "3", "--out", str(tmp_path / "neurons.csv"))
    assert result.exit_code == 0, result.output
    frame = pd.read_csv(tmp_path / "neurons.csv")
    assert list(frame.columns) == ["layer", "neuron", "score", "standard_error", "top_share", "top_frequency", "q_value"]
    assert len(frame) == 4 * 256


@pytest.mark.usefixtures("pictures_as_dots")
def test_compare_prints_the_table_and_writes_it(run: Callable[..., Result], tmp_path: Path) -> None:
    page = run("compare", "--n", "6", "--methods", "deeplift,relp", "--out", str(tmp_path / "page.html"))
    assert page.exit_code == 0, page.output
    assert "deeplift" in page.stdout and (tmp_path / "page.html").stat().st_size > 10_000
    table = run("compare", "--n", "6", "--methods", "relp", "--components", "heads", "--out", str(tmp_path / "table.csv"))
    assert table.exit_code == 0 and tuple(pd.read_csv(tmp_path / "table.csv").columns) == COLUMNS


def test_rank_certifies_its_first_places(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = run("rank", "--n", "4", "--certify", "3", "--top", "4")
    assert result.exit_code == 0, result.output
    for text in ("interval", "reliable", "top 3 settled for the mean of denoising and", "of a full sweep", "false-discovery rate"):
        assert text in " ".join(result.stdout.split()), text
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    attention = run("rank", "attention", "--n", "4", "--top", "3")
    assert attention.exit_code == 0 and "L1.attn@14" in attention.stdout
    for arguments, message in ((("--layer", "1"), "--layer goes with neurons"), (("--method", "relp", "--certify", "2"), "no intervals")):
        refused = run("rank", "--n", "2", *arguments)
        assert refused.exit_code == 2 and message in refused.stderr


def test_circuit_lists_what_is_frequent(run: Callable[..., Result]) -> None:
    result = run("circuit", "--n", "4", "--methods", "relp", "--size", "4", "--frequency", "0.5")
    assert result.exit_code == 0, result.output
    assert "of the 4 strongest nodes by relp, those in at least 50%" in " ".join(result.stdout.split()) and "frequency" in result.stdout


@pytest.mark.usefixtures("pictures_as_dots", "circuits_of_few_sizes")
def test_pairs_of_your_own(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    pd.DataFrame([dict(clean=PROMPT, corrupt=AGAINST, answer="Mary", wrong="John")] * 2).to_csv(path, index=False)
    result = run("report", "--pairs", str(path), "--out", str(tmp_path / "page.html"))
    assert result.exit_code == 0 and "2 pair(s)" in result.stdout
    path.write_text("clean,corrupt,answer,wrong\nMary and John,Mary,Mary,John\n")
    bad = run("rank", "--pairs", str(path))
    assert bad.exit_code == 2 and "row 0: clean has 3 tokens" in bad.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("report", "--rules", "nonsense"), "unknown ruleset 'nonsense'"),
        (("report", "--answer", "Mary"), "--answer goes with --prompt"),
        (("report", "--task", "ioi", "--prompt", PROMPT), "give one of"),
        (("report", "--model", "./no/such/folder"), "there is no folder ./no/such/folder"),
        (("explain", "--prompt", PROMPT, "--answer", "Mary John"), "is 2 tokens"),
        (("explain", "--prompt", PROMPT, "--answer", "Mary", "--against", "Mary gave"), "a position must mean the same"),
        (("rank", "tails"), "rank heads, neurons, attention, not 'tails'"),
        (("compare", "--methods", "nonsense", "--n", "2"), "unknown method 'nonsense'"),
        (("compare", "--direction", "sideways"), "direction is denoising"),
        (("rank", "--task", "chess"), "unknown task 'chess'"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(run: Callable[..., Result], arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.startswith("Error:") and "Traceback" not in result.output


def test_a_page_that_cannot_be_written(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("report", "--n", "2", "--out", str(tmp_path / "missing" / "page.html"))
    assert result.exit_code == 2 and "missing" in result.stderr


def test_a_folder_is_loaded_as_a_hub_name_would_be(tmp_path: Path) -> None:
    original = PreTrainedModel.__dict__["from_pretrained"]
    build_with_words(tmp_path, ["she", "he"])
    model = load_model(str(tmp_path))
    assert not model.training and model.tokenizer is not None
    assert PreTrainedModel.__dict__["from_pretrained"] is original


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    build_with_words(tmp_path, ["she", "he"])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(RelevanceError, match="safetensors"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("name", "message"), [("gpt2-of-nobody", "embedded"), ("tests", "no config.json")])
def test_models_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        load_model(name)


@pytest.mark.slow
@pytest.mark.usefixtures("pictures_as_dots", "circuits_of_few_sizes")
def test_a_model_of_another_family(run: Callable[..., Result], tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip("needs the trained model ../shared/models/stories260k beside the checkout, which is not there")
    result = run("report", "--model", str(STORIES), "--n", "4", "--out", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    assert "logit('she') - logit('he')" in result.stdout
    story = "Once upon a time, there was a little girl named Lily. Lily was very happy because"
    result = run("explain", "--model", str(STORIES), "--prompt", story, "--answer", " she", "--wrong", " he")
    assert result.exit_code == 0 and "L4H2" in result.stdout


def test_coverage_says_what_works(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("coverage", "--sites", "--out", str(tmp_path / "sites.csv"))
    assert result.exit_code == 0, result.output
    assert "deeplift" in result.stdout and "no site" not in result.stdout
    assert "blocks.0.attn" in (tmp_path / "sites.csv").read_text()


def test_estimate_says_what_a_run_takes(run: Callable[..., Result]) -> None:
    result = run("estimate", "--tokens", "64", "--batch", "8", "--rules", "deeplift")
    assert result.exit_code == 0, result.output
    assert "8 x 64 tokens, at once" in result.stdout and "4" in result.stdout
    assert run("estimate", "--rules", "nonsense").exit_code == 2


def test_graph_is_written_as_asked(run: Callable[..., Result], tmp_path: Path) -> None:
    for ending in ("html", "json", "graphml"):
        result = run("graph", "--top", "30", "--out", str(tmp_path / f"graph.{ending}"))
        assert result.exit_code == 0, result.output
        assert (tmp_path / f"graph.{ending}").stat().st_size > 1000
    assert run("graph", "--out", str(tmp_path / "graph.docx")).exit_code == 2


def test_graph_of_a_prompt_in_all_three_forms(run: Callable[..., Result], tmp_path: Path) -> None:
    question = ("--prompt", PROMPT, "--answer", " Mary", "--wrong", " John", "--rules", "attnlrp")
    result = run("graph", *question, "--top", "30", "--out", str(tmp_path / "here"))
    assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.iterdir()} == {"here.html", "here.json", "here.graphml"}
    assert result.output.count("logits@14") == 10 and "2 'Mary'" in result.output
    assert "looks at" in (tmp_path / "here.html").read_text()
    result = run("graph", *question, "--top", "30", "--out", str(tmp_path / "mary.neuronpedia.json"))
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "mary.neuronpedia.json").read_text())
    model = load_model("embedded")
    chance = model(PROMPT)[0, -1].softmax(-1)[model.to_single_token(" Mary")].item()
    answer = next(node for node in content["nodes"] if node["feature_type"] == "logit")
    assert content["metadata"]["slug"] == "mary" and answer["token_prob"] == pytest.approx(chance, rel=1e-5)
    assert FlowGraph.from_neuronpedia(tmp_path / "mary.neuronpedia.json") == FlowGraph.from_json(tmp_path / "here.json")
    assert run("graph", *question, "--top", "30", "--out", str(tmp_path / "mary.neuronpedia.json")).exit_code == 0, (
        "it is ours to overwrite"
    )


@pytest.mark.usefixtures("circuits_of_few_sizes")
def test_circuit_holds_methods_side_by_side(run: Callable[..., Result], tmp_path: Path) -> None:
    mib = ("--task", "ioi", "--mib", str(tmp_path / "mib"))
    result = run("circuit", "--n", "4", "--methods", "deeplift,random", "--out", str(tmp_path / "table.csv"), *mib)
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["method"].unique()) == ["deeplift", "random"] and table["selection_cmd"].is_monotonic_increasing
    result = run("circuit", "--n", "4", "--methods", "deeplift", "--level", "edge", *mib)
    assert result.exit_code == 0, result.output
    assert sorted(path.relative_to(tmp_path / "mib").as_posix() for path in (tmp_path / "mib").rglob("*.json")) == [
        f"deeplift_patching_{level}/ioi_embedded/importances.json" for level in ("edge", "node")
    ]
    graph = read_mib(tmp_path / "mib/deeplift_patching_edge/ioi_embedded/importances.json")
    model = load_model("embedded")
    again = score_items(Ablation(model, ioi(model, 4, 0), "edge"), "deeplift")
    assert np.array_equal(graph.edge_scores, to_mib(model, again).edge_scores)
    assert run("circuit", "--n", "1").exit_code == 2


def test_the_versions_on_which_a_figure_depends() -> None:
    shown = CliRunner().invoke(app, ["--version"])
    assert shown.exit_code == 0 and shown.output.startswith(f"lens-relevance {lens_relevance.__version__}\n")
    assert f"torch {torch.__version__.split('+')[0]}" in shown.output and "transformers 5." in shown.output
