"""Methods held against activation patching, as a table of a page.

    python -m analyses.benchmarks.compared --n 64 --page docs/measurements/heads_against_patching.md
    python -m analyses.benchmarks.compared --model GEMMA --n 16 --page docs/measurements/gemma_ioi.md

It is what `lens-relevance compare` finds, with intervals and passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import pandas as pd
import torch
import typer

from analyses.benchmarks.tables import markdown, write_table
from analyses.components import Run
from analyses.evaluation.comparison import COMPONENTS, METHODS, compare_with_patching
from analyses.models.loading import load_model
from analyses.tasks import TASKS


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each component and method, best first, with intervals over resamples of the pairs."""
    rows = []
    for component, part in table.groupby("component", sort=False):
        for row in part.sort_values("pearson", ascending=False, kind="stable").to_dict("records"):
            rows.append(
                {
                    "component": component,
                    "method": f"`{row['method']}`",
                    "Pearson (95 %)": _interval(row, "pearson"),
                    "Spearman (95 %)": _interval(row, "spearman"),
                    "sign agreement": f"{row['sign_agreement']:.2f}",
                    "magnitude error": f"{row['magnitude_error']:.2f}",
                    "completeness error": "–" if pd.isna(row["completeness"]) else f"{row['completeness']:.3f}",
                    "passes": f"{row['forwards']:g} + {row['backwards']:g}",
                }
            )
    return pd.DataFrame(rows)


def _interval(row: Mapping[Hashable, Any], name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def main(
    *,
    model: Annotated[str, typer.Option(help="Hub name, local folder, or embedded.")] = "embedded",
    task: str = "ioi",
    n: Annotated[int, typer.Option(help="Pairs.")] = 64,
    seed: int = 0,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(METHODS),
    components: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(COMPONENTS),
    run: Annotated[str, typer.Option(help=f"Where coefficients are taken: {', '.join(get_args(Run))}.")] = "corrupt",
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    torch.set_num_threads(1)
    loaded, name, kinds = load_model(model), Path(model).name, components.split(",")
    pairs = TASKS[task](loaded, n=n, seed=seed)
    table = markdown(shown(compare_with_patching(loaded, pairs, methods.split(","), components=kinds, run=run)))  # type: ignore[arg-type]
    typer.echo(table)
    if page is not None:
        options = f"--model {name} --task {task} --n {n} --seed {seed} --methods {methods} --components {components} --run {run}"
        write_table(
            page,
            f"{name}, {task}, {components}",
            table,
            command=f"analyses.benchmarks.compared {options} --page docs/measurements/{page.name}",
            settings=f"{name}, task {task}, {n} pairs, seed {seed}; in brackets 95 % intervals over 200 resamples of the pairs",
        )


if __name__ == "__main__":
    typer.run(main)
