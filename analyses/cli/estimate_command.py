"""estimate: the memory and the passes of a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import Device, Dtype, Model, TrustRemoteCode, clean_errors


@app.command()
@clean_errors
def estimate(
    *,
    model: Model = "embedded",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Prompts in one pass.")] = 1,
    rules: Annotated[str, typer.Option(help="Ruleset: attnlrp, deeplift, cp_lrp, relp, gim, gradient, ...")] = "deeplift",
    names: Annotated[
        list[str] | None, typer.Option("--name", help="A HookPoint to keep; may be repeated. The usual ones if left out.")
    ] = None,
    kept: Annotated[Path | None, typer.Option(help="A folder for what is kept, which then takes no memory.")] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How much memory relevance takes on a model, at once and block by block, and what is free."""
    from analyses.models.loading import load_model
    from analyses.report.terminal import frame_table
    from lens_relevance import estimate as estimated

    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    found = estimated(loaded, tokens, batch, rules=rules, names_filter=names or None, device=kept)
    console = Console()
    table = found.to_frame()
    table["peak"] = table["peak"].map("{:.2f}".format)
    console.print(frame_table(table, f"{rules} on {model}, {batch} x {tokens} tokens: GiB beside the model"))
    console.print(repr(found), markup=False, highlight=False, soft_wrap=True)
