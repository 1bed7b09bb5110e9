"""contexts: the texts of a corpus in which neurons and heads are most relevant, or most active."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import Checkpoint, Device, Dtype, Force, Model, TrustRemoteCode, clean_errors, say


@app.command()
@clean_errors
def contexts(
    *,
    model: Model = "embedded",
    text: Annotated[Path | None, typer.Option(help="A corpus: .txt (a line per text), .jsonl, .csv or .parquet.")] = None,
    column: Annotated[str, typer.Option(help="The field of a table that holds the text.")] = "text",
    components: Annotated[str, typer.Option(help="Comma-separated: neurons, heads.")] = "neurons",
    layers: Annotated[str | None, typer.Option(help="Comma-separated layers; all if left out.")] = None,
    k: Annotated[int, typer.Option(help="How many contexts of each unit to keep.")] = 10,
    window: Annotated[int | None, typer.Option(help="Tokens that the model reads at once; 64 if left out.")] = None,
    rules: Annotated[str, typer.Option(help="Ruleset for single runs.")] = "attnlrp",
    atlas: Annotated[Path | None, typer.Option(help="An atlas made before, in place of a corpus.")] = None,
    unit: Annotated[str | None, typer.Option(help="Comma-separated units to show: L9N1841,L11H3.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the atlas goes: .safetensors.")] = None,
    page: Annotated[Path | None, typer.Option(help="An .html page of the units.")] = None,
    force: Force = False,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the texts in which neurons or heads are most relevant for the model's prediction, and those in which they are most active.

    lens-relevance contexts --text corpus.txt --layers 9 --out atlas.safetensors --unit L9N1841
    """
    from analyses.contexts import Atlas, build_atlas, contexts_page
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError

    units = [name.strip() for name in unit.split(",")] if unit else []
    if (text is None) == (atlas is None):
        raise RelevanceError("give a corpus (--text) or an atlas made before (--atlas)")
    if (text is None or out is None) and not units:
        raise RelevanceError("say where the atlas of a corpus goes (--out), or which units to show (--unit)")
    if page is not None and not units:
        raise RelevanceError("a page shows units: name them with --unit")
    try:
        chosen = None if layers is None else [int(part) for part in layers.split(",")]
    except ValueError as error:
        raise RelevanceError(f"--layers takes numbers, such as 3,9, not {layers!r}") from error
    files = {name: OutputFile(path, force=force) for name, path in (("atlas", out), ("page", page)) if path is not None}
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device) if text is not None or page is not None else None
    if text is None:
        assert atlas is not None
        found = Atlas.load(atlas)
    else:
        assert loaded is not None
        found = build_atlas(
            loaded,
            text,
            [name.strip() for name in components.split(",")],
            layers=chosen,
            k=k,
            window=window,
            rules=rules,
            column=column,
            checkpoint=checkpoint,
        )
        say(f"{found!r}")
    if "atlas" in files:
        files["atlas"].write(found.save)
    for name in units:
        for by in ("relevance", "activation"):
            table = found.contexts(name, by=by)[["relevance", "activation", "predicted", "context"]]
            Console().print(frame_table(table.round(4), f"{name}, by {by}"))
    if "page" in files:
        assert loaded is not None
        files["page"].write(contexts_page(loaded, found, units).save)
