"""How long a perturbation test of one prompt takes on a real language model.

    python -m analyses.benchmarks.perturbation --model FOLDER [--rounds 3]

MoRF and LeRF curves of two rulesets, occlusion and a random order, one token at a time, for the logit of the most likely answer; tokens are
replaced by the mean embedding, by zero, and left out. Medians over rounds, in seconds of processor time on one thread. As Gemma's logits
are of 262,144 tokens, computing them at all positions would take most of that time.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated, Any

import torch
import typer

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


def main(*, model: Annotated[str, typer.Option(help="A name on the hub or a folder.")], rounds: int = 3) -> None:
    """Print a line for each prompt."""
    torch.set_num_threads(1)
    loaded = load_model(model)
    seconds(loaded, PROMPTS[0])  # warm up: the mean embedding is found once for a model
    for prompt in PROMPTS:
        taken = [seconds(loaded, prompt) for _ in range(rounds)]
        n_tokens = loaded.to_tokens(prompt).shape[1]
        typer.echo(f"{n_tokens} tokens, {taken[0][1]} curves: {median(s for s, _ in taken):.1f} s ({prompt!r})")


if __name__ == "__main__":
    typer.run(main)
