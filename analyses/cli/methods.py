"""rank, compare and circuit: components by a method, over many pairs of prompts, and how far the method can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.options import (
    Checkpoint,
    Model,
    Number,
    Pairs,
    Seed,
    Task,
    TrustRemoteCode,
    app,
    asked_question,
    clean_errors,
    typed_command,
)


@app.command()
@clean_errors
def rank(
    what: Annotated[str, typer.Argument(help="heads or neurons")] = "heads",
    model: Model = "embedded",
    method: Annotated[str, typer.Option(help="A ruleset, eap_ig, conductance, weighted_accumulation, ...")] = "deeplift",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 32,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A .csv to write all of them to.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Check the ranking: ablate its top, and as many at random.")] = False,
    checkpoint: Checkpoint = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank heads or neurons over pairs of prompts."""
    from analyses.loading import load_model
    from analyses.ranking import rank_heads, rank_neurons
    from analyses.report.terminal import frame_table
    from analyses.running.processes import processes
    from lens_relevance import RelevanceError

    if what not in ("heads", "neurons"):
        raise RelevanceError(f"rank heads or neurons, not {what!r}")
    here = processes()
    loaded = load_model(model, trust_remote_code)
    question = asked_question(loaded, None, None, None, None, task, pairs, n, seed)
    ranking = (rank_heads if what == "heads" else rank_neurons)(loaded, question.pairs, method, ablate=ablate, checkpoint=checkpoint)
    if here.index:
        return  # every process has the result; the first one speaks
    Console().print(frame_table(ranking.head(top), f"{what} by {method}: {question.words}"))
    if ablate:
        typer.echo(str(ranking.attrs["ablation"]))
    if out is not None:
        ranking.to_csv(out, index=False)


@app.command()
@clean_errors
def compare(
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
    checkpoint: Checkpoint = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Hold every method against activation patching, and write the table as a page."""
    from analyses.comparison import METHODS
    from analyses.comparison import compare as compare_methods
    from analyses.loading import load_model
    from analyses.report.comparison_page import best_methods, comparison_page, correlation_table
    from analyses.report.terminal import frame_table
    from analyses.running.processes import processes
    from lens_relevance import RelevanceError
    from lens_relevance.targets import describe

    if direction not in ("denoising", "noising", "mean"):
        raise RelevanceError(f"direction is denoising, noising or mean, not {direction!r}")
    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",")]
    here = processes()
    loaded = load_model(model, trust_remote_code)
    question = asked_question(loaded, None, None, None, None, task, pairs, n, seed)
    wanted = [name.strip() for name in components.split(",")]
    found = compare_methods(loaded, question.pairs, chosen, wanted, direction, checkpoint=checkpoint)  # type: ignore[arg-type]
    if here.index:
        return  # every process has the result; the first one speaks
    if out.suffix == ".csv":
        found.table.to_csv(out, index=False)
    else:
        comparison_page(found, model, describe(question.pairs.target, loaded), question.words, typed_command()).save(out)
    console = Console()
    console.print(
        frame_table(correlation_table(found.table, brief=True), f"Pearson with activation patching ({direction}), {question.words}")
    )
    console.print(frame_table(best_methods(found.table), "Best"))
    console.print(f"patching itself: {found.patching_seconds:.1f} s; all figures: {out}", markup=False, highlight=False)


@app.command()
@clean_errors
def circuit(
    model: Model = "embedded",
    methods: Annotated[str | None, typer.Option(help="Comma-separated rulesets, eap_ig, patching, random; all if left out.")] = None,
    level: Annotated[str, typer.Option(help="node or edge: what a circuit is made of.")] = "node",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 16,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="A .csv to write the table to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How faithful the circuits are that each method finds: everything outside a circuit is set to the counterpart's value.

    Circuits are found on one half of the pairs and evaluated on the other.
    """
    from analyses.circuits import faithfulness_table
    from analyses.circuits.faithfulness import METHODS
    from analyses.loading import load_model
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError

    if level not in ("node", "edge"):
        raise RelevanceError(f"level is node or edge, not {level!r}")
    loaded = load_model(model, trust_remote_code)
    question = asked_question(loaded, None, None, None, None, task, pairs, n, seed)
    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",")]
    half = len(question.pairs) // 2
    if half == 0:
        raise RelevanceError("circuits are found on one half of the pairs and evaluated on the other, so there must be two pairs or more")
    found_on, held_out = question.pairs[slice(0, half)], question.pairs[slice(half, None)]
    table = faithfulness_table(loaded, found_on, chosen, level, held_out=held_out)  # type: ignore[arg-type]
    if out is not None:
        table.to_csv(out, index=False)
    title = (
        f"Circuits of {level}s, {question.title}: found on {half} pairs (selection_cmd), CMD (0 is best) and CPR on {len(held_out)} others"
    )
    Console().print(frame_table(table.round(4), title))
