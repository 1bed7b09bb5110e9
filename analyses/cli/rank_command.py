"""rank: heads, neurons or attention outputs by a method, over many pairs of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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

_KINDS = {"heads": "heads", "neurons": "neurons", "attention": "attn"}


@app.command()
@clean_errors
def rank(
    what: Annotated[str, typer.Argument(help="heads, neurons, or attention (attention outputs by position)")] = "heads",
    *,
    model: Model = "embedded",
    method: Annotated[str, typer.Option(help="combined, a ruleset, eap_ig, conductance, weighted_accumulation, ...")] = "combined",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 32,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    certify: Annotated[int | None, typer.Option(min=1, help="Patch until so many first places are settled, given the intervals.")] = None,
    direction: Annotated[str, typer.Option(help="What --certify patches: denoising, noising, or the mean of both.")] = "mean",
    layer: Annotated[int | None, typer.Option(min=0, help="Rank the neurons of this layer alone.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .csv to write all of them to, or an .html page with their intervals.")] = None,
    force: Force = False,
    atlas: Annotated[Path | None, typer.Option(help="Also the best context of each in an atlas (lens-relevance contexts).")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Check the ranking: ablate its top, and as many at random.")] = False,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank heads, neurons or attention outputs over pairs of prompts."""
    from analyses.components import COMPONENTS, resolve_direction
    from analyses.contexts import Atlas
    from analyses.datasets.processes import processes
    from analyses.evaluation.ranking import rank_heads, rank_neurons, rank_positions
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.ranking_table import ranking_notes, ranking_table
    from analyses.report.terminal import frame_table
    from analyses.report.unit_labels import unit_labels
    from lens_relevance import RelevanceError

    if what not in _KINDS:
        raise RelevanceError(f"rank {', '.join(_KINDS)}, not {what!r}")
    if layer is not None and what != "neurons":
        raise RelevanceError("--layer goes with neurons")
    if ablate and what == "attention":
        raise RelevanceError("--ablate goes with heads and neurons")
    if atlas is not None and what == "attention":
        raise RelevanceError("--atlas goes with heads and neurons")
    kind = COMPONENTS[_KINDS[what]]
    file = None if out is None else OutputFile(out, force=force, columns=("layer", kind.index, "score", "standard_error"))
    here = processes()
    contexts = None if atlas is None else Atlas.load(atlas)
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    question = asked_question(loaded, task=task, pairs=pairs, n=n, seed=seed)
    options: dict[str, Any] = {"certify": certify, "direction": resolve_direction(direction), "checkpoint": checkpoint}
    if what == "heads":
        ranking = rank_heads(loaded, question.pairs, method, ablate=ablate, **options)
    elif what == "neurons":
        ranking = rank_neurons(loaded, question.pairs, method, ablate=ablate, layer=layer, **options)
    else:
        ranking = rank_positions(loaded, question.pairs, method, **options)
    if here.index:
        return  # every process has the result; the first one speaks
    shown = ranking_table(ranking.head(top), kind.name, ranking.attrs["top_k"])
    Console().print(frame_table(shown, f"{what} by {method}: {question.words}"))
    for note in ranking_notes(ranking):
        Console().print(Text(note))
    if what != "attention":
        labels, note = unit_labels(loaded, question.pairs, shown[kind.index].tolist(), atlas=contexts)
        if len(labels.columns) > 1:
            Console().print(frame_table(labels, "What they write"))
        Console().print(Text(note))
    if ablate:
        say(ranking.attrs["ablation"])
    if file is not None and file.path.suffix == ".html":
        from analyses.report.intervals import ranking_page

        title = f"{what[0].upper()}{what[1:]} by {method}"
        file.write(ranking_page(ranking, kind, title=title, words=f"{question.words}.", command=typed_command()).save)
    elif file is not None:
        file.write_table(ranking)
