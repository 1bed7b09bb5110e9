"""How far scores, intervals and certified rankings can be trusted: against exhaustive patching (docs/measurements/reliability.md).

    python -m analyses.benchmarks.reliability [--model FOLDER --tasks ioi,induction --seeds 0,1 --n 16] [--results FOLDER]
    python -m analyses.benchmarks.reliability_table FOLDER --page docs/measurements/reliability.md

Per task, seed and kind of component: Pearson and Spearman of `combined` with patching (mean of both directions), with 95 % intervals; the
best other method; the share of intervals that hold the patched value, the share of scores that are flagged, how many scores are off by more
than 20 % of the largest effect, and how many of these are flagged. Per task and seed: the checks of the yardstick, and whether the
certified top 10 is that of exhaustive patching, at which share of its forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.reliability_table import CERTIFIED, MEASURED, RUN, certified_row, keep, measured, shown, uses
from analyses.components import Node, resolve_component
from analyses.evaluation.comparison import Comparison, compare
from analyses.evaluation.ranking import rank_heads, rank_neurons, rank_positions
from analyses.models.loading import load_model
from analyses.patching import activation_patching
from analyses.tasks import TASKS, PromptPairs

METHODS = ("combined", "deeplift", "deeplift_ln", "relp", "gradient")
QUERIES_AND_KEYS = (*METHODS, "atp_star", "second_order")
PLACES = 10


def certified(
    model: TransformerBridge, pairs: PromptPairs, found: Comparison, kind: str, *, checkpoint: Path | None = None
) -> dict[str, object]:
    """The certified top of a kind of component against that of the comparison's exhaustive patching."""
    component = resolve_component(kind)
    rank = rank_heads if component.index == "head" else rank_positions
    ranking = rank(model, pairs, component=kind, certify=PLACES, checkpoint=checkpoint)
    scores = found.scores[found.scores["component"] == kind].dropna(subset=["patching"])
    effects = dict(zip(zip(scores["layer"], scores["index"], strict=True), scores["patching"], strict=True))
    return certified_row(ranking, effects, places=PLACES, what=component.label)


def neurons_of_a_layer(model: TransformerBridge, pairs: PromptPairs, layer: int) -> dict[str, object]:
    """The certified top neurons of a layer."""
    ranking = rank_neurons(model, pairs, certify=PLACES, layer=layer)
    nodes = [Node("neurons", layer, neuron=int(i)) for i in ranking["neuron"]]
    effect = activation_patching(model, pairs, nodes, direction="mean", progress=False).effect.mean(1).tolist()
    effects = dict(zip(zip(ranking["layer"], ranking["neuron"], strict=True), effect, strict=True))
    return certified_row(ranking, effects, places=PLACES, what=f"neurons of layer {layer}")


def main(
    *,
    model: Annotated[str, typer.Option(help="'embedded', a folder, or a hub name.")] = "embedded",
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "ioi,induction",
    seeds: Annotated[str, typer.Option(help="Seeds of the pairs, comma-separated.")] = "0",
    components: Annotated[str, typer.Option(help="Comma-separated.")] = "resid,attn,mlp,heads,v",
    queries: Annotated[bool, typer.Option(help="Also queries and keys, which take second derivatives.")] = True,
    certify: Annotated[str, typer.Option(help="Kinds of components that are certified, comma-separated.")] = "heads",
    neurons: Annotated[str, typer.Option(help="Layers whose neurons are certified, comma-separated.")] = "",
    checkpoint: Annotated[Path | None, typer.Option(help="A folder: an interrupted run goes on from there.")] = None,
    results: Annotated[Path | None, typer.Option(help="A folder: rows are kept there, those of the same runs replaced.")] = None,
    n: int = 32,
) -> None:
    """Print the tables, and keep their rows."""
    loaded, shared = load_model(model), {"model": Path(model).name, "pairs": n, "measured": f"{datetime.now(UTC):%Y-%m-%d}"}
    rows: list[dict[str, object]] = []
    tops: list[dict[str, object]] = []
    checks: list[pd.DataFrame] = []
    for task, seed in [(task, int(seed)) for task in tasks.split(",") for seed in seeds.split(",")]:
        pairs, where = TASKS[task](loaded, n=n, seed=seed), shared | {"task": task, "seed": seed}
        parts: list[tuple[Sequence[str], Sequence[str]]] = [(METHODS, components.split(","))]
        if queries:
            parts.append((QUERIES_AND_KEYS, ["q", "k"]))
        for methods, kinds in parts:
            kept = None if checkpoint is None else checkpoint / f"{task} {seed} {' '.join(kinds)}"
            found = compare(loaded, pairs, list(methods), components=kinds, checkpoint=kept)
            rows += [where | row for row in measured(found)]
            checks.append(found.yardstick.assign(task=task, seed=seed))
            for doubt in found.doubts:
                Console().print(f"{task}: {doubt}")
            for kind in [kind for kind in certify.split(",") if kind in kinds]:
                tops.append(where | certified(loaded, pairs, found, kind, checkpoint=None if kept is None else kept / f"certified {kind}"))
        tops += [where | neurons_of_a_layer(loaded, pairs, int(layer)) for layer in neurons.split(",") if layer]
        if results is not None:
            keep(rows, results / MEASURED, [*RUN, "component", "method"])
            keep(tops, results / CERTIFIED, [*RUN, "what"])
    table = pd.DataFrame(rows)
    for frame in (shown(table), uses(table), pd.concat(checks, ignore_index=True).round(3), pd.DataFrame(tops)):
        print(frame.to_string(index=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
