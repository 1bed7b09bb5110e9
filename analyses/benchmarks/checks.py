"""What the comparison of a model with its sites costs: the first call, which makes it, and later ones, over calls with `check=False`.

    python -m analyses.benchmarks.checks [--model FOLDER] [--batch 4 --positions 32 --repeats 9]

GPT-2-small shape with random weights, or a model's folder. Every case runs once per round, the rounds interleave, and each figure is the
median over rounds of the ratio of processor times to a call with `check=False` of the same round.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any
from unittest.mock import patch

import typer
from rich.console import Console

from analyses.benchmarks.engine import gpt2_shape, interleaved, ratios
from analyses.benchmarks.real_model import prompts
from analyses.models.loading import load_model
from lens_relevance import engine, logit_diff, propagate

BASE = "check=False"


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
) -> None:
    """Print the tables."""
    bridge = gpt2_shape() if model is None else load_model(model)
    for rules in ("attnlrp", "deeplift"):
        table = ratios(interleaved(cases(bridge, rules, batch=batch, positions=positions), repeats, "cpu"), BASE)
        Console().print(f"{model or 'GPT-2-small shape'}, {rules}, {batch} x {positions} tokens, medians of {repeats} rounds")
        Console().print(table.to_string(index=False, float_format="{:.3f}".format))


if __name__ == "__main__":
    typer.run(main)
