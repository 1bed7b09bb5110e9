"""rank: heads or neurons by a method, over many pairs of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import (
    Checkpoint,
    Device,
    Dtype,
    Force,
    Model,
    Number,
    Pairs,
    Seed,
    Task,
    TrustRemoteCode,
    asked_question,
    clean_errors,
    say,
)


@app.command()
@clean_errors
def rank(
    what: Annotated[str, typer.Argument(help="heads or neurons")] = "heads",
    *,
    model: Model = "embedded",
    method: Annotated[str, typer.Option(help="A ruleset, eap_ig, conductance, weighted_accumulation, ...")] = "deeplift",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 32,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A .csv to write all of them to.")] = None,
    force: Force = False,
    ablate: Annotated[bool, typer.Option("--ablate", help="Check the ranking: ablate its top, and as many at random.")] = False,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank heads or neurons over pairs of prompts."""
    from analyses.datasets.processes import processes
    from analyses.evaluation.ranking import rank_heads, rank_neurons
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError

    if what not in ("heads", "neurons"):
        raise RelevanceError(f"rank heads or neurons, not {what!r}")
    file = None if out is None else OutputFile(out, force=force, columns=("layer", what.removesuffix("s"), "score", "standard_error"))
    here = processes()
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    question = asked_question(loaded, task=task, pairs=pairs, n=n, seed=seed)
    ranking = (rank_heads if what == "heads" else rank_neurons)(loaded, question.pairs, method, ablate=ablate, checkpoint=checkpoint)
    if here.index:
        return  # every process has the result; the first one speaks
    Console().print(frame_table(ranking.head(top), f"{what} by {method}: {question.words}"))
    if ablate:
        say(ranking.attrs["ablation"])
    if file is not None:
        file.write_table(ranking)
