"""Whether other pairs give the same circuit: overlap of the strongest edges over draws of pairs (docs/measurements/edge_stability.md).

    python -m analyses.benchmarks.edge_stability [--model FOLDER --task pronoun --draws 6 --n 16] [--page PAGE]

Each draw holds other pairs of the task. For every share, the edges of largest |mean score| of two draws are compared by Jaccard,
|A and B| / |A or B|, and the mean over all pairs of draws is printed, with the lowest of them.
"""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tables import markdown, write_table
from analyses.circuits import Ablation, score_items
from analyses.evaluation.stability import top_sets
from analyses.methods import estimator
from analyses.models.loading import load_model
from analyses.tasks import TASKS

METHODS = ("deeplift", "gradient", "eap_ig", "conductance")
"""`gradient` over edges is EAP (Syed et al. 2023)."""
SHARES = (0.01, 0.02, 0.05, 0.1)


def overlaps(scores: np.ndarray, share: float) -> np.ndarray:
    """Jaccard of the strongest share of the edges for each pair of draws; scores [draw, edge]."""
    tops = top_sets(scores, max(1, round(share * scores.shape[1])))
    return np.array([(a & b).sum() / (a | b).sum() for a, b in combinations(tops, 2)])


def row_of(model: TransformerBridge, method: str, task: str, *, draws: int, n: int) -> dict[str, object]:
    """A method's row."""
    chosen, found, seconds = estimator(method), [], []
    for seed in range(draws):
        ablation = Ablation(model, TASKS[task](model, n=n, seed=seed), "edge")
        start = time.perf_counter()
        found.append(score_items(ablation, chosen).signed)
        seconds.append(time.perf_counter() - start)
    by_share = {share: overlaps(np.stack(found), share) for share in SHARES}
    return {
        "method": f"`{method}`",
        **{f"top {share:.0%}": f"{values.mean():.3f} ({values.min():.3f})" for share, values in by_share.items()},
        "passes": f"{chosen.forwards} + {chosen.backwards}",
        "seconds": round(float(np.median(seconds)), 2),
        "edges": found[0].size,
    }


def main(
    model: Annotated[str, typer.Option(help="Hub name, local folder, or embedded.")] = "embedded",
    task: Annotated[str, typer.Option(help="Which task.")] = "ioi",
    draws: Annotated[int, typer.Option(help="Draws of pairs.")] = 6,
    n: Annotated[int, typer.Option(help="Pairs per draw.")] = 16,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    loaded, name = load_model(model), Path(model).name
    rows = pd.DataFrame([row_of(loaded, method, task, draws=draws, n=n) for method in METHODS])
    table = markdown(rows.drop(columns="edges"))
    typer.echo(table)
    if page is not None:
        options = f"--model {name} --task {task} --draws {draws} --n {n} --page docs/measurements/edge_stability.md"
        settings = (
            f"{name}, task {task}, {rows['edges'][0]:,} edges, {draws} draws of {n} pairs (seeds 0 to {draws - 1}); in brackets the lowest"
        )
        write_table(page, f"{name}, {task}", table, command=f"analyses.benchmarks.edge_stability {options}", settings=settings)


if __name__ == "__main__":
    typer.run(main)
