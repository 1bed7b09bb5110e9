"""The check of GPT-2 small, on a random GPT-2 of its shape (12 layers of 12 heads, but narrow) that knows the words of the task."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import typer
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from analyses.benchmarks import gpt2_check as module
from analyses.benchmarks.gpt2_check import KNOWN_HEADS, OWN, PUBLISHED, gpt2_check
from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads
from analyses.models.loading import load_model
from analyses.tasks import ioi
from analyses.tasks.ioi_task import NAMES, OBJECTS, PLACES, TEMPLATES
from tests.models import build_with_words, randomize

WORDS = [*NAMES, *PLACES, *OBJECTS, *(word.strip(",") for template in TEMPLATES for word in template.split() if "{" not in word)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk as a user has it."""
    path = tmp_path_factory.mktemp("gpt2")
    small = build_with_words(path, WORDS)
    config = GPT2Config(vocab_size=small.cfg.d_vocab, n_positions=32, n_embd=24, n_layer=12, n_head=12, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    randomize(model, seed=0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:  # twelve layers: smaller weights keep the stream in bounds
            parameter.data.mul_(2 / 3)
    model.save_pretrained(path)
    return path


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, list(arguments))


def test_tables_are_those_of_the_ranking_and_the_comparison(folder: Path) -> None:
    model = load_model(str(folder))
    pairs = ioi(model, 3, corruption="abc")
    check = gpt2_check(model, pairs, top_k=30)
    ranking = rank_heads(model, pairs, OWN)
    order = [f"{row.layer}.{row.head}" for row in ranking.itertuples()]
    assert len(check.heads) == sum(map(len, KNOWN_HEADS.values())) == 12
    for row in check.heads.itertuples():
        assert order[row.rank - 1] == row.head
        assert row.score == pytest.approx(float(ranking["score"][row.rank - 1]), rel=1e-5)
        assert row.in_top == (row.rank <= 30)
    assert 0 < check.found == len({*order[:30]} & {*check.heads["head"]})
    assert check.heads[["previous_token", "duplicate_token", "induction"]].notna().all(axis=None)

    table = compare_with_patching(
        model, pairs, ["relp", "gradient", "deeplift"], components=["resid", "attn", "mlp"], direction="denoising"
    )
    both = check.cells.merge(table, on=["method", "component"])
    assert len(both) == 9
    assert (both["pearson_x"] - both["pearson_y"]).abs().max() < 1e-6
    for row in check.cells.itertuples():
        if row.method in PUBLISHED:
            assert row.published == PUBLISHED[row.method][row.component]
            assert row.difference == pytest.approx(row.pearson - row.published)
        else:
            assert pd.isna(row.published) and pd.isna(row.difference)


def test_the_command_prints_both(folder: Path) -> None:
    result = run("--model", str(folder), "--n", "4", "--top", "30")
    assert result.exit_code == 0, result.output
    for text in ("name mover", "9.9", "S-inhibition", "of 12 among the top 30 of 144", "relp", "0.968", "0.195", "deeplift"):
        assert text in result.stdout, text
    assert "not GPT-2 small" not in result.stdout


def test_a_model_without_these_heads_is_not_gpt2_small(tmp_path: Path) -> None:
    build_with_words(tmp_path, WORDS)  # one layer of two heads
    result = run("--model", str(tmp_path), "--n", "4")
    assert result.exit_code == 0, result.output
    assert "0 of 12 among the top 20 of 2; 12 are no heads of" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"), [(("--model", "./no/such"), "there is no folder"), (("--direction", "up"), "direction is denoising")]
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.output
