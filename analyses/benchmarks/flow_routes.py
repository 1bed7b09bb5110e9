"""How the graph of contributions differs from the graph of relevance, over heads (docs/measurements/flow_routes.md).

    python -m analyses.benchmarks.flow_routes --model FOLDER [--pairs 8] [--threshold 0.04]

Two tasks: ioi, and capitals ("The capital of France is the city of", against another country). A head's score is, by relevance, that of its
node summed over positions, absolute after averaging over prompts: against the corrupt prompt, and of the clean prompt alone (against the
mean embedding); by contribution, what flows through it in the whole graph of the clean prompt, and its largest single contribution. Each
is held against activation patching of heads (mean of both directions, absolute). Intervals are 95 %, over resampled pairs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from rich.console import Console
from scipy.stats import rankdata
from transformer_lens.model_bridge import TransformerBridge

from analyses.edges.wiring import wiring
from analyses.evaluation.agreement import bootstrap_weights, correlation, weighted_means
from analyses.evaluation.stability import top_sets
from analyses.graph import FlowGraph, flow_graphs, head_routes
from analyses.models.loading import load_model
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs, ioi
from analyses.tasks.fitting import single_token_words
from lens_relevance import RelevanceError, logit_diff

CAPITALS = {
    **{"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Russia": "Moscow", "Germany": "Berlin", "England": "London"},
    **{"Spain": "Madrid", "Egypt": "Cairo", "Greece": "Athens", "China": "Beijing", "Austria": "Vienna", "Cuba": "Havana"},
}
TOP, RESAMPLES = 10, 1000
Scores = np.ndarray
"""[head, prompt]"""


def capitals(model: TransformerBridge, n: int) -> PromptPairs:
    """Pairs of prompts that differ in the country, with the target logit(its capital) - logit(the other's)."""
    known = [
        (country, city)
        for country, city in CAPITALS.items()
        if len(single_token_words(model, [country])[0]) == 1 and len(single_token_words(model, [city])[0]) == 1
    ]
    if len(known) <= n:
        raise RelevanceError(f"{len(known)} of the capitals are single tokens of this tokenizer; take fewer than {len(known)} pairs")
    rows = [*pairwise(known[: n + 1])]
    clean, corrupt = ([f"The capital of {row[i][0]} is the city of" for row in rows] for i in (0, 1))
    target = logit_diff([f" {row[0][1]}" for row in rows], [f" {row[1][1]}" for row in rows])
    return PromptPairs(model.to_tokens(clean), model.to_tokens(corrupt), target)


def head_names(model: TransformerBridge) -> list[str]:
    """All heads, layer by layer."""
    return [name for layer in wiring(model).layers for name in layer.heads]


def scores(model: TransformerBridge, pairs: PromptPairs) -> dict[str, Scores]:
    """Scores of all heads by each graph, and effects of patching them."""
    patched = activation_patching(model, pairs, ["heads"], direction="mean", progress=False)
    names = head_names(model)
    assert [str(node) for node in patched.nodes] == names
    against = flow_graphs(model, pairs.clean, pairs.target, reference=pairs.corrupt)
    found = {"patching": patched.effect.double().numpy(), "relevance, against the other prompt": _scores(against, names)}
    del against
    found["relevance, one prompt"] = _scores(flow_graphs(model, pairs.clean, pairs.target), names)
    routes = flow_graphs(model, pairs.clean, pairs.target, kind="contribution")
    found["contribution, flow through"] = _scores(routes, names)
    found["contribution, largest"] = np.stack(
        [g.edges.groupby("target")["score"].max().reindex(names, fill_value=0.0).to_numpy() for g in routes], 1
    )
    return found


def _scores(graphs: list[FlowGraph], names: list[str]) -> Scores:
    columns = [g.nodes.groupby("node")["score"].sum().reindex(names, fill_value=0.0).to_numpy() for g in graphs]
    return np.stack(columns, 1)


def compared(found: dict[str, Scores]) -> pd.DataFrame:
    """Spearman with patching, and how many of the first heads each has in common with patching and with relevance between the prompts."""
    n = found["patching"].shape[1]
    weights = np.concatenate([np.ones((1, n)), bootstrap_weights(n, RESAMPLES)])
    means = {name: np.abs(weighted_means(values, weights)) for name, values in found.items()}
    ranks = {name: rankdata(values, axis=1) for name, values in means.items()}
    tops = {name: top_sets(values, TOP) for name, values in means.items()}
    rows = []
    for name in [name for name in found if name != "patching"]:
        row = {"graph": name, "Spearman with patching": _cell(correlation(ranks[name], ranks["patching"]))}
        for other in ("patching", "relevance, against the other prompt"):
            row[f"first {TOP} shared with {other.split(',')[0]}"] = _cell((tops[name] & tops[other]).sum(1).astype(float))
        rows.append(row)
    return pd.DataFrame(rows)


def _cell(values: np.ndarray) -> str:
    """The value of all pairs, and where 95 % of the resampled ones lie."""
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"


def made_of(model: TransformerBridge, pairs: PromptPairs) -> str:
    """What flows through all heads, and through all MLPs, a path counted as often as it passes one; shares of tokens."""
    routes = flow_graphs(model, pairs.clean, pairs.target, kind="contribution")
    by_kind = pd.concat([g.nodes.groupby("component")["score"].sum() for g in routes], axis=1).mean(axis=1)
    first = np.mean([g.nodes[(g.nodes["component"] == "embed") & (g.nodes["position"] == 0)]["score"].sum() for g in routes])
    return f"through heads {by_kind['heads']:.2f}, through MLPs {by_kind['mlp']:.2f} times; from the first token {first:.2f}"


def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name or a folder.")],
    n_pairs: Annotated[int, typer.Option("--pairs", help="Pairs of each task.")] = 8,
    threshold: Annotated[float, typer.Option(help="For the heads on the route.")] = 0.04,
) -> None:
    """Print the tables of docs/measurements/flow_routes.md."""
    loaded, say = load_model(model), Console(width=200).print
    for name, pairs in (("ioi", ioi(loaded, n_pairs, seed=11)), ("capitals", capitals(loaded, n_pairs))):
        say(f"{name}, {len(pairs)} pairs of {pairs.clean.shape[1]} tokens")
        found = scores(loaded, pairs)
        say(compared(found).to_string(index=False))
        first = {kind: np.abs(values.mean(1)) for kind, values in found.items()}
        nodes = head_names(loaded)
        for kind, values in first.items():
            say(f"{kind}: {', '.join(nodes[i] for i in np.argsort(-values)[:TOP])}")
        say(made_of(loaded, pairs))
        table = head_routes(loaded, pairs.clean, pairs.target, threshold=threshold)
        say(f"on the route at {threshold:g}: {int((table['on_route'] > 0).sum())} of {len(table)} heads in some prompt")
        say(table.head(TOP).round(3).to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
