"""Rankings and a comparison in a process of their own, for tests that start several processes, or kill one.

python -m tests.analyses.streamed_run FOLDER     all analyses, an atlas, and the command; every process writes what it got
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analyses.contexts import Atlas, build_atlas
from analyses.evaluation.comparison import compare
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.methods import Estimator, Scores, estimator
from analyses.models.loading import load_model
from analyses.tasks import PromptPairs
from tests import models
from tests.analyses.test_contexts import TEXTS
from tests.analyses.test_ranking import random_pairs

N_PAIRS = 23  # odd, so that shares and last batches differ in size
BATCH = 2


def told(before_batch: Callable[[PromptPairs], None], name: str = "relp") -> Estimator:
    """A method that tells of each batch before it is run."""
    plain = estimator(name)

    def one_run(model: Any, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        before_batch(pairs)
        return plain.one_run(model, pairs, components)

    return Estimator(plain.name, one_run, plain.forwards, plain.backwards, plain.symmetric)


def heads(method: Any = "relp", checkpoint: Path | None = None, n: int = N_PAIRS, **options: Any) -> pd.DataFrame:
    return rank_heads(models.build_gpt2(), random_pairs(n), method, batch_size=BATCH, checkpoint=checkpoint, **options)


def neurons(method: Any = "relp", checkpoint: Path | None = None, n: int = N_PAIRS, **options: Any) -> pd.DataFrame:
    return rank_neurons(models.build_gpt2(), random_pairs(n), method, batch_size=BATCH, checkpoint=checkpoint, **options)


def comparison(method: Any = "relp", checkpoint: Path | None = None, n: int = N_PAIRS) -> pd.DataFrame:
    """All scores of two methods and of patching, and the figures of the table except the time taken."""
    methods = [method, "gradient"]
    options: dict[str, Any] = dict(components=("resid", "heads"), resamples=20, batch_size=BATCH, checkpoint=checkpoint)
    found = compare(models.build_gpt2(), random_pairs(n), methods, **options)
    return pd.concat([found.scores, found.table.drop(columns="seconds")], ignore_index=True)


def atlas() -> Atlas:
    return build_atlas(load_model("embedded"), TEXTS, layers=[1], k=3, window=16)


ANALYSES: dict[str, Callable[..., pd.DataFrame]] = {"heads": heads, "neurons": neurons, "comparison": comparison}


def stepped(name: str, checkpoint: Path) -> None:
    """One analysis, batch by batch: says "batch" and waits for a line before each."""

    def step(pairs: PromptPairs) -> None:
        print("batch", flush=True)
        if not sys.stdin.readline():
            raise EOFError("nobody says go on")

    ANALYSES[name](told(step), checkpoint)


def share(folder: Path) -> None:
    from analyses.cli import app
    from analyses.contexts import build
    from analyses.datasets.processes import processes

    here = processes()
    build._TOKENS_PER_PASS = 64  # several passes
    atlas().save(folder / f"atlas-{here.index}")
    batches: list[int] = []
    for name, analysis in ANALYSES.items():
        options = {} if name == "comparison" else {"ablate": True}
        frame = analysis(told(lambda pairs: batches.append(len(pairs))), **options)
        frame.to_csv(folder / f"{name}-{here.index}.csv", index=False)
        if options:
            (folder / f"{name}-{here.index}.txt").write_text(repr(frame.attrs["ablation"]))
    (folder / f"pairs-{here.index}.txt").write_text(f"{here.count} {sum(batches)}")
    app(["rank", "heads", "--n", "6", "--out", str(folder / "command.csv")], standalone_mode=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    share(Path(sys.argv[1]))
