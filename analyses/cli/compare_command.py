"""compare: methods held against activation patching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

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
    typed_command,
)


@app.command()
@clean_errors
def compare(
    *,
    model: Model = "embedded",
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated rulesets, eap_ig, conductance, weighted_accumulation, ...; all if left out.")
    ] = None,
    components: Annotated[str, typer.Option(help="Comma-separated: resid, attn, mlp, heads.")] = "resid,attn,mlp,heads",
    direction: Annotated[str, typer.Option(help="The yardstick: denoising, noising, or the mean of both.")] = "mean",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 64,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The page to write; with the ending .csv the table alone.")] = Path("comparison.html"),
    force: Force = False,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Hold every method against activation patching, and write the table as a page."""
    from analyses.components import resolve_direction
    from analyses.datasets.processes import processes
    from analyses.evaluation.comparison import COLUMNS, METHODS
    from analyses.evaluation.comparison import compare as compare_methods
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.comparison_page import (
        UNDEFINED,
        best_methods,
        comparison_page,
        correlation_table,
        coverage_lines,
        yardstick_shown,
    )
    from analyses.report.terminal import frame_table
    from lens_relevance.inputs.targets import describe

    yardstick = resolve_direction(direction)
    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",")]
    file = OutputFile(out, force=force, columns=COLUMNS)
    here = processes()
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    question = asked_question(loaded, task=task, pairs=pairs, n=n, seed=seed)
    wanted = [name.strip() for name in components.split(",")]
    comparison = compare_methods(loaded, question.pairs, chosen, components=wanted, direction=yardstick, checkpoint=checkpoint)
    if here.index:
        return  # every process has the result; the first one speaks
    console = Console()
    title = f"Pearson, and under it Spearman, with activation patching ({direction}), {question.words}"
    console.print(frame_table(correlation_table(comparison.table, brief=True), title))
    console.print(frame_table(best_methods(comparison.table), "Best"))
    if comparison.table["pearson"].isna().any():
        say(UNDEFINED)
    console.print(frame_table(yardstick_shown(comparison), "Checks of the yardstick"))
    for line in (*(f"Doubtful: {doubt}" for doubt in comparison.doubts), *coverage_lines(comparison)):
        console.print(Text(line))
    if out.suffix == ".csv":
        file.write_table(comparison.table)
    else:
        target = describe(question.pairs.target, loaded)
        file.write(comparison_page(comparison, model, target, words=question.words, command=typed_command()).save)
    say(f"patching itself: {comparison.patching_seconds:.1f} s; all figures: {out}")
