"""How long a perturbation test of one prompt takes on a real language model.

    python -m analyses.benchmarks.perturbation --model FOLDER [--rounds 3] [--page PAGE]

MoRF and LeRF curves of two rulesets, occlusion and a random order, one token at a time, for the logit of the most likely answer; tokens are
replaced by the mean embedding, by zero, and left out. Medians over rounds, in seconds of processor time on one thread. As Gemma's logits
are of 262,144 tokens, computing them at all positions would take most of that time.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from analyses.benchmarks.tables import markdown, write_table
from analyses.models.loading import load_model
from analyses.perturbation import perturbation_curves
from lens_relevance import logit

PROMPTS = (
    "The Eiffel Tower is in the city of",
    "When Mary and John went to the store, John gave a drink to",
)
METHODS = ("attnlrp", "deeplift", "occlusion")
BASELINES = ("mean_embedding", "zero_embedding", "delete")


def seconds(model: Any, prompt: str) -> tuple[float, int]:
    """Processor time of the test of one prompt, and how many curves it gave."""
    started = time.process_time()
    with torch.no_grad():
        best = int(model(prompt, return_type="logits")[0, -1].argmax())
    curves = perturbation_curves(model, prompt, logit(best), methods=METHODS, baselines=BASELINES)
    return time.process_time() - started, len(curves.groupby(["method", "baseline", "order"]))


def main(
    *,
    model: Annotated[str, typer.Option(help="A name on the hub or a folder.")],
    rounds: int = 3,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print a row for each prompt, and write them into the page."""
    torch.set_num_threads(1)
    loaded, name, rows = load_model(model), Path(model).name, []
    seconds(loaded, PROMPTS[0])  # warm up: the mean embedding is found once for a model
    for prompt in PROMPTS:
        taken = [seconds(loaded, prompt) for _ in range(rounds)]
        n_tokens = loaded.to_tokens(prompt).shape[1]
        rows.append({"prompt": prompt, "tokens": n_tokens, "curves": taken[0][1], "seconds": f"{median(s for s, _ in taken):.1f}"})
    written = markdown(pd.DataFrame(rows))
    typer.echo(written)
    if page is not None:
        settings = (
            f"{name}; {', '.join(METHODS)} and random, tokens removed in {len(BASELINES)} ways, both orders; processor time of "
            f"one thread, medians of {rounds} rounds"
        )
        command = f"analyses.benchmarks.perturbation --model {name} --rounds {rounds} --page docs/measurements/costs.md"
        write_table(page, f"perturbation, {name}", written, command=command, settings=settings)


if __name__ == "__main__":
    typer.run(main)
