"""How far scores, intervals and certified rankings can be trusted: against exhaustive patching (docs/measurements/reliability.md).

    python -m analyses.benchmarks.reliability [--model FOLDER --tasks ioi,induction --n 16]

Per task and kind of component: Pearson and Spearman of `combined` with patching (mean of both directions) and their 95 % intervals; the
best other method; the share of intervals that hold the patched value, the share of scores that are flagged, how many scores are off by more
than 20 % of the largest effect, and how many of these are flagged. Per task: the checks of the yardstick, and whether the certified top 10
is that of exhaustive patching, at which share of its forwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Node
from analyses.evaluation.comparison import Comparison, compare
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.models.loading import load_model
from analyses.patching import activation_patching
from analyses.tasks import TASKS, PromptPairs

METHODS = ("combined", "deeplift", "deeplift_ln", "relp", "gradient")
QUERIES_AND_KEYS = (*METHODS, "atp_star", "second_order")
PLACES = 10


def rows_of(found: Comparison, task: str) -> list[dict[str, object]]:
    """A row per kind of component."""
    assert found.bracketed is not None
    rows: list[dict[str, object]] = []
    for name, held in found.bracketed[1].items():
        here = found.table[found.table["component"] == name].set_index("method")
        combined, others = here.loc["combined"], here.drop(index="combined")["pearson"]
        rows.append(
            {
                "task": task,
                "component": name,
                "n": held.n,
                "Pearson": f"{combined['pearson']:.3f} ({combined['pearson_low']:.3f} to {combined['pearson_high']:.3f})",
                "Spearman": f"{combined['spearman']:.3f} ({combined['spearman_low']:.3f} to {combined['spearman_high']:.3f})",
                "best other": f"{others.idxmax()} {others.max():.3f}",
                "inside": f"{held.inside:.3f}",
                "flagged": f"{held.flagged:.3f}",
                "wrong": round(held.wrong * held.n),
                "of these flagged": "–" if held.recall != held.recall else round(held.recall * held.wrong * held.n),
            }
        )
    return rows


def certified_row(ranking: pd.DataFrame, effects: dict[tuple[int, int], float], *, task: str, what: str) -> dict[str, object]:
    """Whether the certified top is that of patching everything.

    Args:
        effects: effects of exhaustive patching by (layer, index).
    """
    best = set(sorted(effects, key=lambda node: -abs(effects[node]))[:PLACES])
    settled = set(zip(ranking["layer"][:PLACES], ranking.iloc[:PLACES, 1], strict=True))
    certificate = ranking.attrs["certificate"]
    return {
        "task": task,
        "what": what,
        "right": f"{len(best & settled)} of {PLACES}",
        "patched": f"{certificate.patched} of {certificate.n}",
        "forwards": f"{certificate.forwards} of {certificate.sweep}",
        "share": f"{certificate.forwards / certificate.sweep:.3f}",
    }


def neurons_of_a_layer(model: TransformerBridge, pairs: PromptPairs, layer: int, *, task: str) -> dict[str, object]:
    """The certified top neurons of a layer."""
    ranking = rank_neurons(model, pairs, certify=PLACES, layer=layer)
    nodes = [Node("neurons", layer, neuron=int(i)) for i in ranking["neuron"]]
    effect = activation_patching(model, pairs, nodes, direction="mean", progress=False).effect.mean(1).tolist()
    effects = dict(zip(zip(ranking["layer"], ranking["neuron"], strict=True), effect, strict=True))
    return certified_row(ranking, effects, task=task, what=f"neurons of layer {layer}")


def main(
    *,
    model: Annotated[str, typer.Option(help="'embedded', a folder, or a hub name.")] = "embedded",
    tasks: Annotated[str, typer.Option(help="Comma-separated.")] = "ioi,induction",
    components: Annotated[str, typer.Option(help="Comma-separated.")] = "resid,attn,mlp,heads",
    queries: Annotated[bool, typer.Option(help="Also queries and keys, which take second derivatives.")] = True,
    neurons: Annotated[str, typer.Option(help="Layers whose neurons are certified, comma-separated.")] = "",
    n: int = 32,
    seed: int = 0,
) -> None:
    """Print the tables."""
    loaded = load_model(model)
    rows: list[dict[str, object]] = []
    certified: list[dict[str, object]] = []
    checks: list[pd.DataFrame] = []
    for task in tasks.split(","):
        pairs = TASKS[task](loaded, n=n, seed=seed)
        parts: list[tuple[Sequence[str], Sequence[str]]] = [(METHODS, components.split(","))]
        if queries:
            parts.append((QUERIES_AND_KEYS, ["q", "k"]))
        for methods, kinds in parts:
            found = compare(loaded, pairs, list(methods), components=kinds)
            rows += rows_of(found, task)
            checks.append(found.yardstick.assign(task=task))
            for doubt in found.doubts:
                Console().print(f"{task}: {doubt}")
            if "heads" in kinds:
                scores = found.scores[found.scores["component"] == "heads"]
                effects = dict(zip(zip(scores["layer"], scores["index"], strict=True), scores["patching"], strict=True))
                certified.append(certified_row(rank_heads(loaded, pairs, certify=PLACES), effects, task=task, what="heads"))
        certified += [neurons_of_a_layer(loaded, pairs, int(layer), task=task) for layer in neurons.split(",") if layer]
    for frame in (pd.DataFrame(rows), pd.concat(checks, ignore_index=True).round(3), pd.DataFrame(certified)):
        print(frame.to_string(index=False) + "\n")


if __name__ == "__main__":
    typer.run(main)
