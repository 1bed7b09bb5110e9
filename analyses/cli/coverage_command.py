"""coverage: which rules hold where on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import (
    Device,
    Dtype,
    Force,
    Model,
    TrustRemoteCode,
    clean_errors,
    say,
)


@app.command()
@clean_errors
def coverage(
    *,
    model: Model = "embedded",
    sites: Annotated[bool, typer.Option("--sites", help="List every site too.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .csv with all sites and rulesets.")] = None,
    force: Force = False,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which rulesets work on a model, and where it has parts without a rule."""
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.terminal import frame_table
    from lens_relevance import coverage as covered

    file = None if out is None else OutputFile(out, force=force, columns=("site", "operation", "inputs", "output", "live", "off"))
    report = covered(load_model(model, trust_remote_code, dtype=dtype, device=device))
    console = Console()
    console.print(frame_table(report.rulesets, f"Rulesets on {model}"))
    for part, reason in report.uncovered.items():
        say(f"no site: {part}: {reason}")
    if sites:
        console.print(
            frame_table(report.sites[["site", "operation", "live", "off", "deeplift", "attnlrp"]], "Sites, with the rules of two rulesets")
        )
    if file is not None:
        file.write_table(report.sites)
