"""A table of circuits that is killed, at any moment, goes on where it was and ends with the same bits."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analyses.circuits import faithfulness_table
from analyses.cli import app
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError
from tests.analyses.streamed_run import told
from tests.analyses.test_ranking import random_pairs
from tests.forked_processes import Forked
from tests.models import build_gpt2

NAMES = ("relp", "gradient", "deeplift")
# 2 random orders beside: 3 + 5 scores, and 2 orders on found and held-out pairs of each
N_PARTS = (len(NAMES) + 5) * (1 + 2 * 2)


def table(checkpoint: Path | None = None, before: object = lambda name: None, **changes: object) -> pd.DataFrame:
    """`before` is told the name of each method before its first batch of pairs."""
    methods = [told(lambda pairs, name=name: before(name), name) for name in NAMES]  # type: ignore[misc, operator]
    arguments: dict[str, object] = dict(level="node", held_out=random_pairs(5)[2:], seed=3)
    return faithfulness_table(build_gpt2(), random_pairs(3), [*methods, "random"], checkpoint=checkpoint, **arguments | changes)  # type: ignore[arg-type]


def stepped(name: str) -> None:
    """Says "method" before each method, and waits for a line."""
    print("method", flush=True)
    if not sys.stdin.readline():
        raise EOFError


@pytest.mark.slow
def test_a_killed_table_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, chance = table(), random.Random(time.time_ns())
    assert whole["cmd"].nunique() > 5 and list(whole.columns) == ["method", "order", "cmd", "cpr", "selection_cmd"]
    reached, at_most = chance.choice([(2, 0.05), (3, 0.6)])  # within scores, or within curves
    checkpoint = tmp_path / "run"
    child = Forked(table, checkpoint, stepped)
    for _ in range(reached):
        assert child.stdout.readline() == "method\n", child.stderr.read()
        child.stdin.write("go on\n")
        child.stdin.flush()
    time.sleep(chance.uniform(0, at_most))
    child.kill()
    assert child.wait() in (-9, 0)
    before = {path.name: path.stat().st_mtime_ns for path in checkpoint.glob("*.safetensors") if not path.name.startswith(".")}
    assert len(before) >= (reached - 1) * 5
    told_again: list[str] = []
    resumed = table(checkpoint, told_again.append)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert told_again == list(NAMES[reached - 1 :] if f"scores-{reached - 1}-0.safetensors" not in before else NAMES[reached:])
    after = {path.name: path.stat().st_mtime_ns for path in checkpoint.glob("*.safetensors") if not path.name.startswith(".")}
    assert len(after) == N_PARTS and before.items() <= after.items()


def test_a_completed_table_is_read(tmp_path: Path) -> None:
    def never(name: str) -> None:
        raise AssertionError("a completed run is read, not run")

    whole = table(tmp_path)
    pd.testing.assert_frame_equal(table(tmp_path, never), whole, check_exact=True)
    pd.testing.assert_frame_equal(table(), whole, check_exact=True)


OTHER = random_pairs(5)[2:]
CHANGES: dict[str, tuple[dict[str, object], str]] = {
    "level": (dict(level="edge"), 'level: "node" there, "edge" here'),
    "seed": (dict(seed=4), "seed: 3 there, 4 here"),
    "held-out prompts": (dict(held_out=random_pairs(6)[2:]), "held-out pairs: "),
    "held-out target": (dict(held_out=PromptPairs(OTHER.clean, OTHER.corrupt, lambda logits: logits[:, -1, 4])), "held-out pairs: "),
    "no held-out": (dict(held_out=None), "held-out pairs: .* null here"),
}


@pytest.mark.usefixtures("circuits_of_few_sizes")
@pytest.mark.parametrize("name", list(CHANGES))
def test_the_checkpoint_of_another_table_is_refused(name: str, tmp_path: Path) -> None:
    change, words = CHANGES[name]
    table(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RelevanceError, match=f"another run .*{words}"):
        table(tmp_path, **change)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.usefixtures("circuits_of_few_sizes")
def test_the_command_resumes(tmp_path: Path) -> None:
    arguments = [
        "circuit",
        "--n",
        "4",
        "--methods",
        "gradient,random",
        "--checkpoint",
        str(tmp_path / "run"),
        "--out",
        str(tmp_path / "t.csv"),
    ]
    results = []
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        results.append((result.stdout, (tmp_path / "t.csv").read_bytes()))
    assert results[0] == results[1] and len(list((tmp_path / "run").iterdir())) == 1 + (1 + 5) * 5
    arguments[2] = "6"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "another run" in result.stderr and (tmp_path / "t.csv").read_bytes() == results[0][1]
