"""How much the split of relevance by `deeplift` depends on how a chain of three factors is bracketed (docs/derivation.md).

    python -m analyses.benchmarks.bracketing [--model FOLDER --task ioi --n 8] [--page docs/measurements/bracketing.md]

The pair form of a product is exact, but a chain of three factors can be split as (a b) c or as a (b c), and the shares differ. Three chains
occur in transformers; for each the table compares the split in use with another one, from the same activations and coefficients:

| chain | in use | compared with |
|---|---|---|
| gate: g sigma(g) up, where f(g) = g sigma(g) | f(g) and up | g and sigma(g) up |
| attention: softmax(q k) v of one head | pattern and v, then q and k | the Shapley values of q, k and v |
| expert: router weight, f(gate), up | weight and f(gate) up | the Shapley values of the three |

A share is what would move from one factor to another: half of the summed absolute differences, over the summed absolute relevance in use.
Sums over all factors are equal in both, to rounding; the benchmark stops where they are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor

from analyses.benchmarks.tables import markdown, write_table
from analyses.benchmarks.tiny_models import build
from analyses.methods.deeplift_shapley_method import Split, attention_sites, attention_split, both_runs, shapley
from analyses.models.loading import load_model
from analyses.tasks import TASKS
from lens_relevance import logit_diff, propagate
from lens_relevance.cache import RelevanceCache
from lens_relevance.rules import Experts, GatedActivation
from lens_relevance.rules.activation import rescale_factor
from lens_relevance.rules.base import working
from lens_relevance.sites import Site, anatomy


def moved(ours: Split, other: Split) -> float:
    """The share of relevance that the other split gives to other factors; raises AssertionError where the two do not add up alike."""
    total, alike = (sum(float(x.double().sum()) for x in split) for split in (ours, other))
    size = sum(float(x.abs().sum()) for x in ours)
    assert abs(total - alike) <= 1e-4 * size, (total, alike, size)
    return sum(float((x - y).abs().sum()) for x, y in zip(ours, other, strict=True)) / 2 / size if size else 0.0


def gate_split(site: Site, cache: RelevanceCache) -> tuple[Split, Split]:
    """Relevance of gate and up, with the product taken as f(g) up and as g (sigma(g) up)."""
    op = site.operation
    assert isinstance(op, GatedActivation)
    (gate, gate2), (up, up2) = (both_runs(cache, str(point.name)) for point in site.inputs)
    upstream = working(cache.coefficients[site.output_name])
    zero = torch.zeros_like(gate)

    def sigma(x: Tensor) -> Tensor:
        return rescale_factor(op.function, x, op.function(x), x2=zero, y2=zero)

    s, s2, act, act2 = sigma(gate), sigma(gate2), op.function(gate), op.function(gate2)
    ours = (upstream * (up + up2) / 2 * (act - act2), upstream * (act + act2) / 2 * (up - up2))
    means = (gate + gate2) / 2, (s + s2) / 2, (up + up2) / 2
    to_gate = (s * up + s2 * up2) / 2 * (gate - gate2) + means[0] * means[2] * (s - s2)
    return ours, (upstream * to_gate, upstream * means[0] * means[1] * (up - up2))


def expert_splits(site: Site, cache: RelevanceCache) -> Iterator[tuple[Split, Split]]:
    """Relevance of router weight, activated gate and up for every expert, and the Shapley values of the three."""
    op = site.operation
    assert isinstance(op, Experts)
    inputs = tuple(op.flat(x) for x in both_runs(cache, str(site.inputs[0].name)))
    upstream = working(cache.coefficients[site.output_name]).flatten(0, 1)
    chosen = [op.chosen(x) for x in inputs]
    weights = [op.router.weights(op.router.logits(op.router.scores(x), c), c) for x, c in zip(inputs, chosen, strict=True)]
    for e in range(op.n):
        tokens = (chosen[0][:, e] | chosen[1][:, e]).nonzero().flatten()
        expert = op.expert(e)
        parts = [expert.parts(x[tokens]) for x in inputs]
        to_neurons = upstream[tokens] @ expert.down
        w = [weight[tokens, e : e + 1].expand_as(to_neurons) for weight in weights]
        act, up = [op.gated.function(gate) for gate, _ in parts], [up for _, up in parts]
        values: dict[tuple[int, ...], Tensor] = {(i, j, m): to_neurons * w[i] * act[j] * up[m] for i, j, m in product((0, 1), repeat=3)}
        mean = [(x[0] + x[1]) / 2 for x in (w, act, up)]
        change = [x[0] - x[1] for x in (w, act, up)]
        neurons = (act[0] * up[0] + act[1] * up[1]) / 2
        ours = (neurons * change[0], mean[0] * mean[2] * change[1], mean[0] * mean[1] * change[2])
        yield tuple(to_neurons * x for x in ours), shapley(values)


def shares(model: Any, runs: Any, reference: Any, target: Any) -> pd.DataFrame:
    """A row per layer and chain: the share of relevance that the other split gives to other factors."""
    cache = propagate(model, runs, target, rules="deeplift", reference=reference, names_filter=lambda _: True)
    sites: Sequence[Site] = anatomy(model).sites
    rows = [(layer[0].layer, "attention", moved(*attention_split(*layer, cache=cache))) for layer in attention_sites(model)]
    for site in sites:
        if isinstance(site.operation, GatedActivation):
            rows.append((site.layer, "gate", moved(*gate_split(site, cache))))
        elif isinstance(site.operation, Experts):
            ours, others = zip(*expert_splits(site, cache), strict=True)
            rows.append((site.layer, "expert", moved(sum(ours, ()), sum(others, ()))))
    return pd.DataFrame(rows, columns=["layer", "chain", "moved"])


def main(
    *,
    model: Annotated[str | None, typer.Option(help="A name on the hub or a folder; random tiny Mixtral and Llama if left out.")] = None,
    task: str = "ioi",
    n: int = 8,
    page: Annotated[Path | None, typer.Option(help="The page with the tables' places.")] = None,
) -> None:
    """Print, for each chain, the median and the largest share over layers, and write it into the page."""
    if model is None:
        asked = "one token of 8 exchanged"
        found = {f"tiny {name}, random weights": of_random_weights(name, n) for name in ("llama", "mixtral")}
    else:
        loaded, asked = load_model(model), f"task {task}"
        pairs = TASKS[task](loaded, n=n)
        found = {Path(model).name: shares(loaded, pairs.clean, pairs.corrupt, pairs.target)}
    for name, table in found.items():
        shown = markdown(summary(table))
        typer.echo(f"{name}\n{shown}")
        if page is not None:
            options = "" if model is None else f" --model {name} --task {task}"
            command = f"analyses.benchmarks.bracketing{options} --n {n} --page docs/measurements/bracketing.md"
            write_table(page, name, shown, command=command, settings=f"{name}, {asked}, {n} pairs, seed 0")


def of_random_weights(name: str, n: int) -> pd.DataFrame:
    """`shares` of a tiny model of this family; n prompts against themselves with one token exchanged."""
    tokens = torch.randint(1, 50, (n, 8), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 3] = (tokens[:, 3] + 7) % 50
    return shares(build(name), tokens, other, logit_diff(3, 4))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each chain: the median and the largest share, and the layer of the largest."""
    rows = table.groupby("chain")["moved"].agg(["median", "max", "idxmax", "count"])
    return pd.DataFrame(
        {
            "chain": rows.index,
            "median": rows["median"].map("{:.3f}".format).to_numpy(),
            "largest": rows["max"].map("{:.3f}".format).to_numpy(),
            "in layer": table["layer"][rows["idxmax"]].map("{:g}".format).to_numpy(),
            "layers": rows["count"].to_numpy(),
        }
    )


if __name__ == "__main__":
    typer.run(main)
