"""How faithful the circuits of each method are, with several draws of pairs (docs/measurements/circuits.md).

    python -m analyses.benchmarks.circuits --page docs/measurements/circuits.md
    python -m analyses.benchmarks.circuits --model STORIES260K --task pronoun --page docs/measurements/circuits.md

Circuits are found on one half of a draw and evaluated on the other, as `lens-relevance circuit` does: everything outside is set to the
counterpart's value. CMD is the area between the faithfulness curve and 1: 0 is best.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import pandas as pd
import torch
import typer
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tables import markdown, write_table
from analyses.circuits import faithfulness_table
from analyses.circuits.items import Level
from analyses.circuits.methods_compared import METHODS
from analyses.models.loading import load_model
from analyses.tasks import TASKS

COMPARED = (*METHODS[:-2], "conductance", *METHODS[-2:])
"""All one-pass rulesets, both methods of several passes, patching of single items, and random orders."""


def cmd(model: TransformerBridge, task: str, methods: tuple[str, ...], *, level: Level, n: int, seeds: int) -> pd.DataFrame:
    """CMD of each method on the half that it was not found on, a column for each draw, in the order that is better on the other half."""
    draws = {}
    for seed in range(seeds):
        pairs = TASKS[task](model, n=n, seed=seed)
        found_on, held_out = pairs[slice(0, n // 2)], pairs[slice(n // 2, None)]
        table = faithfulness_table(model, found_on, methods, level=level, held_out=held_out)
        draws[seed] = table.sort_values("selection_cmd", kind="stable").groupby("method", sort=False)["cmd"].first()
    return pd.DataFrame(draws)


def shown(by_level: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each method, best first over nodes; the mean over draws with the lowest and the highest."""
    cells = {
        f"CMD, {level}s": {m: f"{row.mean():.3f} ({row.min():.3f} to {row.max():.3f})" for m, row in found.iterrows()}
        for level, found in by_level.items()
    }
    first = next(iter(by_level.values())).mean(axis=1).sort_values(kind="stable").index
    frame = pd.DataFrame(cells).reindex(first).fillna("–")
    return frame.rename(index=lambda name: f"`{name}`").rename_axis("method").reset_index()


def main(
    *,
    model: Annotated[str, typer.Option(help="Hub name, local folder, or embedded.")] = "embedded",
    task: str = "ioi",
    n: Annotated[int, typer.Option(help="Pairs in a draw, both halves together.")] = 16,
    seeds: Annotated[int, typer.Option(help="Draws of pairs.")] = 2,
    levels: Annotated[str, typer.Option(help="Comma-separated: node, edge.")] = "node,edge",
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    torch.set_num_threads(1)
    loaded, name = load_model(model), Path(model).name
    chosen: list[Level] = [level for level in get_args(Level) if level in levels.split(",")]
    table = markdown(shown({level: cmd(loaded, task, COMPARED, level=level, n=n, seeds=seeds) for level in chosen}))
    typer.echo(table)
    if page is not None:
        options = f"--model {name} --task {task} --n {n} --seeds {seeds} --levels {levels} --page docs/measurements/circuits.md"
        command = f"analyses.benchmarks.circuits {options}"
        halves = f"{n // 2} pairs to find circuits on and {n - n // 2} to evaluate them"
        draws = f"mean over {seeds} draws (seeds 0 to {seeds - 1}), in brackets the lowest and the highest"
        write_table(page, f"{name}, {task}", table, command=command, settings=f"{name}, task {task}, {halves}; {draws}")


if __name__ == "__main__":
    typer.run(main)
