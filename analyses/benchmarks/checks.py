"""What the comparison of a model with its sites costs: the first call, which makes it, and later ones, over calls with `check=False`.

    python -m analyses.benchmarks.checks [--model FOLDER] [--batch 4 --positions 32 --repeats 9] [--page PAGE]

GPT-2-small shape with random weights, or a model's folder. Every case runs once per round, the rounds interleave, and each figure is the
median over rounds of the ratio of processor times to a call with `check=False` of the same round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import pandas as pd
import torch
import typer

from analyses.benchmarks.engine import gpt2_shape, interleaved, ratios
from analyses.benchmarks.real_model import prompts
from analyses.benchmarks.tables import markdown, write_table
from analyses.models.loading import load_model
from lens_relevance import engine, logit_diff, propagate

BASE = "check=False"
RULES = ("attnlrp", "deeplift")


def cases(model: Any, rules: str, *, batch: int, positions: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    tokens, other = prompts(model, batch, positions)
    options: dict[str, Any] = dict(rules=rules, reference=other if rules == "deeplift" else None)

    def call(**more: Any) -> Any:
        return propagate(model, tokens, logit_diff(11, 22), **options, **more)

    def first() -> Any:
        with patch.object(engine.CHECKED, "holds", return_value=False):
            return call()

    return {BASE: lambda: call(check=False), "later calls": call, "first call": first}


def main(
    *,
    model: Annotated[str | None, typer.Option(help="a model's folder; GPT-2-small shape by default")] = None,
    batch: int = 4,
    positions: int = 32,
    repeats: int = 9,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    torch.set_num_threads(1)
    bridge = gpt2_shape() if model is None else load_model(model)
    name, columns = "GPT-2-small shape" if model is None else Path(model).name, {}
    for rules in RULES:
        found = ratios(interleaved(cases(bridge, rules, batch=batch, positions=positions), repeats, "cpu"), BASE)
        columns[f"`{rules}`"] = found.set_index("case")["ratio"].drop(BASE).map("{:.2f}".format)
    written = markdown(pd.DataFrame(columns).rename_axis("over check=False").reset_index())
    about = f"{name}, {batch} x {positions} tokens, one thread, processor time, medians of {repeats} interleaved rounds"
    typer.echo(f"{about}\n{written}")
    if page is not None:
        given = "" if model is None else f"--model {name} "
        options = f"{given}--batch {batch} --positions {positions} --repeats {repeats} --page docs/measurements/costs.md"
        write_table(page, f"checks, {name}", written, command=f"analyses.benchmarks.checks {options}", settings=about)


if __name__ == "__main__":
    typer.run(main)
