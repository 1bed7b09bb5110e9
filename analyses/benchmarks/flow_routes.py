"""How the graph of contributions differs from the graph of relevance, over heads (docs/measurements/flow_routes.md).

    python -m analyses.benchmarks.flow_routes --model FOLDER [--tasks ioi,capitals] [--pairs 8] [--threshold 0.04] [--page PAGE]

Two tasks: ioi, and capitals ("The capital of France is the city of", against another country). A head's score is, by relevance, that of its
node summed over positions, absolute after averaging over prompts: against the corrupt prompt, and of the clean prompt alone (against the
mean embedding); by contribution, what flows through it in the whole graph of the clean prompt, and its largest single contribution. Each
is held against activation patching of heads (mean of both directions, absolute). Intervals are 95 %, over resampled pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from scipy.stats import rankdata
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tables import markdown, write_table
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
AGAINST = "relevance, between the two prompts"
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


PAIRS: dict[str, Callable[[TransformerBridge, int], PromptPairs]] = {"ioi": lambda model, n: ioi(model, n, seed=11), "capitals": capitals}


def head_names(model: TransformerBridge) -> list[str]:
    """All heads, layer by layer."""
    return [name for layer in wiring(model).layers for name in layer.heads]


def scores(model: TransformerBridge, pairs: PromptPairs) -> dict[str, Scores]:
    """Scores of all heads by each graph, and effects of patching them."""
    patched = activation_patching(model, pairs, ["heads"], direction="mean", progress=False)
    names = head_names(model)
    assert [str(node) for node in patched.nodes] == names
    against = flow_graphs(model, pairs.clean, pairs.target, reference=pairs.corrupt)
    found = {"patching": patched.effect.double().numpy(), AGAINST: head_scores(against, names)}
    del against
    found["relevance, one prompt"] = head_scores(flow_graphs(model, pairs.clean, pairs.target), names)
    routes = flow_graphs(model, pairs.clean, pairs.target, kind="contribution")
    found["contribution, flow through"] = head_scores(routes, names)
    found["contribution, largest"] = np.stack(
        [g.edges.groupby("target")["score"].max().reindex(names, fill_value=0.0).to_numpy() for g in routes], 1
    )
    return found


def head_scores(graphs: list[FlowGraph], names: list[str]) -> Scores:
    """What each graph says of each head, summed over positions."""
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
        for other in ("patching", AGAINST):
            row[f"first {TOP} shared with {other}"] = _cell((tops[name] & tops[other]).sum(1).astype(float), "{:.0f}")
        rows.append(row)
    return pd.DataFrame(rows)


def _cell(values: np.ndarray, form: str = "{:.2f}") -> str:
    """The value of all pairs, and where 95 % of the resampled ones lie."""
    return "{} ({} to {})".format(*(form.format(value) for value in (values[0], *np.nanpercentile(values[1:], [2.5, 97.5]))))


def first_heads(found: dict[str, Scores], names: list[str]) -> pd.DataFrame:
    """The first heads of each graph, and of patching."""
    orders = {name: np.argsort(-np.abs(values.mean(1)), kind="stable") for name, values in found.items()}
    return pd.DataFrame([{"graph": name, f"first {TOP}": ", ".join(names[i] for i in order[:TOP])} for name, order in orders.items()])


def made_of(model: TransformerBridge, pairs: PromptPairs, *, threshold: float) -> pd.DataFrame:
    """What the graph of contributions says of the states: shares of the first token, what paths pass, which heads are on the route."""
    graphs = flow_graphs(model, pairs.clean, pairs.target, kind="contribution")
    by_kind = pd.concat([g.nodes.groupby("component")["score"].sum() for g in graphs], axis=1).mean(axis=1)
    first = np.mean([g.nodes[(g.nodes["component"] == "embed") & (g.nodes["position"] == 0)]["score"].sum() for g in graphs])
    routes = head_routes(model, pairs.clean, pairs.target, threshold=threshold)
    carried = ", ".join(f"{row.node} {row.through:.2f}" for row in routes.sort_values("through", ascending=False).head(3).itertuples())
    rows = {
        "share of what reaches the logits that begins at the first token": f"{first:.2f}",
        "heads that a path passes on average": f"{by_kind['heads']:.1f}",
        "MLPs that a path passes on average": f"{by_kind['mlp']:.1f}",
        f"heads on the route of some prompt at a threshold of {threshold:g}": f"{int((routes['on_route'] > 0).sum())} of {len(routes)}",
        "what flows through most, on the routes": carried,
    }
    return pd.DataFrame(rows.items(), columns=["of the graph of contributions", "mean over prompts"])


def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name or a folder.")] = "embedded",
    tasks: Annotated[str, typer.Option(help=f"Comma-separated: {', '.join(PAIRS)}.")] = ",".join(PAIRS),
    n_pairs: Annotated[int, typer.Option("--pairs", help="Pairs of each task.")] = 8,
    threshold: Annotated[float, typer.Option(help="For the heads on the route.")] = 0.04,
    page: Annotated[Path | None, typer.Option(help="The page with the tables' places.")] = None,
) -> None:
    """Print the tables, and write them into the page."""
    loaded, name = load_model(model), Path(model).name
    command = f"analyses.benchmarks.flow_routes --model {name} --tasks {tasks} --pairs {n_pairs} --threshold {threshold:g}"
    for task in tasks.split(","):
        pairs = PAIRS[task](loaded, n_pairs)
        found = scores(loaded, pairs)
        of = f"{name}, {task}, {len(pairs)} pairs of {pairs.clean.shape[1]} tokens{', seed 11' if task == 'ioi' else ''}"
        heads = f"{of}, {len(head_names(loaded))} heads"
        shown = {
            f"{name}, {task}": (compared(found), f"{heads}; in brackets 95 % intervals over {RESAMPLES} resamples of the pairs"),
            f"{name}, {task}, first heads": (first_heads(found, head_names(loaded)), f"{heads}, by the size of their mean over pairs"),
            f"{name}, {task}, routes": (made_of(loaded, pairs, threshold=threshold), heads),
        }
        for place, (table, settings) in shown.items():
            typer.echo(f"{settings}\n{markdown(table)}\n")
            if page is not None:
                write_table(page, place, markdown(table), command=f"{command} --page docs/measurements/flow_routes.md", settings=settings)


if __name__ == "__main__":
    typer.run(main)
