"""Neurons that a fact depends on: found by relevance, verified by taking them out and by amplifying them.

    python -m analyses.benchmarks.knowledge_neurons --model FOLDER --page docs/measurements/knowledge_neurons.md [--rules attnlrp]

AttnLRP's use of relevance for knowledge neurons (Achtibat et al. 2024, section 4.4), over the facts below that the model gets right. For
each: the `--k` neurons with the largest relevance for the logit of its answer, held at 0 and multiplied at all tokens, beside as many
neurons with the largest activation, and as many drawn at random. Notebook 8 does this step by step on the embedded model.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tables import markdown
from analyses.evaluation.agreement import mean_with_interval
from analyses.evaluation.token_tables import with_interval
from analyses.interventions import Scale, set_units
from analyses.models.loading import load_model
from lens_relevance import __version__, logit, propagate
from lens_relevance.sites import anatomy

# fmt: off
CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Austria": "Vienna",
    "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Russia": "Moscow", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Cuba": "Havana", "Peru": "Lima", "England": "London", "Ireland": "Dublin", "Sweden": "Stockholm",
    "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Syria": "Damascus", "Kenya": "Nairobi", "Belgium": "Brussels", "Lebanon": "Beirut", "Thailand": "Bangkok", "Vietnam": "Hanoi",
}
LANGUAGES = {
    "Brazil": "Portuguese", "Mexico": "Spanish", "Austria": "German", "Iran": "Persian", "Egypt": "Arabic", "Israel": "Hebrew",
}
SIGHTS = {"Eiffel Tower": "Paris", "Colosseum": "Rome", "Kremlin": "Moscow", "Brandenburg Gate": "Berlin", "Acropolis": "Athens"}
# fmt: on
RANDOM = 3  # draws, of which the mean is taken
CHOICES = ("relevance", "activation", "activation at the last token", "random")


def facts() -> list[tuple[str, str]]:
    """(prompt, answer) of all facts."""
    return [
        *((f"The capital of {country} is the city of", f" {city}") for country, city in CAPITALS.items()),
        *((f"The official language of {country} is", f" {language}") for country, language in LANGUAGES.items()),
        *((f"The {sight} is in the city of", f" {city}") for sight, city in SIGHTS.items()),
    ]


@torch.no_grad()
def known(model: TransformerBridge) -> list[tuple[str, Int[Tensor, "1 pos"], int, int]]:
    """Facts whose answer is the model's most likely next token: prompt, tokens, answer (its first token) and runner-up."""
    found = []
    for prompt, answer in facts():
        tokens, whole = model.to_tokens(prompt), model.to_tokens(prompt + answer)[0]
        first, second = model(tokens)[0, -1].topk(2).indices.tolist()
        if len(whole) > tokens.shape[1] and first == int(whole[tokens.shape[1]]):
            found.append((prompt, tokens, first, second))
    return found


def scores(model: TransformerBridge, tokens: Int[Tensor, "1 pos"], answer: int, *, rules: str) -> dict[str, Float[Tensor, "layer neuron"]]:
    """What neurons are chosen by: relevance, summed over tokens; the largest |activation| of a token but the first, and of the last."""
    names = anatomy(model).layout["neurons"]
    cache = propagate(model, tokens, logit(answer), rules=rules, names_filter=names)
    active = torch.stack([cache.activations[name][0] for name in names]).abs()
    relevance = torch.stack([cache[name][0].sum(0) for name in names])
    return {"relevance": relevance, "activation": active[:, 1:].amax(1), "activation at the last token": active[:, -1]}


def largest(values: Float[Tensor, "layer neuron"], k: int) -> list[str]:
    """Names of the k neurons with the largest values."""
    width = values.shape[1]
    return [f"L{i // width}N{i % width}" for i in values.flatten().topk(k).indices.tolist()]


@torch.no_grad()
def outcome(model: TransformerBridge, tokens: Int[Tensor, "1 pos"], answer: int, *, other: int) -> dict[str, float]:
    """Probability of the answer, and its logit less that of the runner-up."""
    logits = model(tokens)[0, -1].double()
    return {"probability": float(logits.softmax(-1)[answer]), "difference": float(logits[answer] - logits[other])}


def measure(model: TransformerBridge, *, k: int, factor: float, rules: str, seed: int) -> Iterator[dict[str, object]]:
    """A row for each fact, choice of neurons and factor; factor 1 is the model as it is."""
    chance = torch.Generator().manual_seed(seed)
    for prompt, tokens, answer, other in known(model):
        found = scores(model, tokens, answer, rules=rules)
        yield {"fact": prompt, "choice": "", "factor": 1.0} | outcome(model, tokens, answer, other=other)
        drawn = [torch.rand(found["relevance"].shape, generator=chance) for _ in range(RANDOM)]
        chosen = {name: [largest(values, k)] for name, values in found.items()} | {"random": [largest(values, k) for values in drawn]}
        for name, sets in chosen.items():
            for times in (0.0, factor):
                rows = []
                for units in sets:
                    with set_units(model, {unit: Scale(times) for unit in units}):
                        rows.append(outcome(model, tokens, answer, other=other))
                means = {what: sum(row[what] for row in rows) / len(rows) for what in rows[0]}
                yield {"fact": prompt, "choice": name, "factor": times, "units": " ".join(sets[0])} | means


def changes(rows: pd.DataFrame, what: str) -> pd.DataFrame:
    """Change of `what` against the model as it is, [fact] x (choice, factor)."""
    wide = rows.pivot(index="fact", columns=["choice", "factor"], values=what).loc[rows["fact"].unique()]
    return wide.sub(wide["", 1.0], axis=0)


def tables(rows: pd.DataFrame, factor: float) -> str:
    """Mean changes with intervals over facts, and those of relevance less the controls."""
    text = []
    for what, words in (("probability", "Probability of the answer"), ("difference", "Logit of the answer less that of the runner-up")):
        found, before = changes(rows, what), rows.loc[rows["factor"] == 1.0, what]
        lines = []
        for name in CHOICES:
            cells = [found[name, 0.0], found[name, factor]]
            paired = [found["relevance", times] - found[name, times] for times in (0.0, factor)]
            cells += [] if name == "relevance" else paired
            shown = [with_interval(*mean_with_interval(cell.to_numpy())) for cell in cells] + ["–"] * (4 - len(cells))
            lines.append([name, *shown])
        head = ["neurons", "held at 0", f"times {factor:g}", "relevance less this, at 0", f"relevance less this, times {factor:g}"]
        title = f"{words}: {with_interval(*mean_with_interval(before.to_numpy()))} as the model is. Changes:"
        text.append(f"{title}\n\n{markdown(pd.DataFrame(lines, columns=head))}")
    return "\n\n".join(text)


def per_fact(rows: pd.DataFrame, factor: float) -> str:
    """The probability of each answer, and its neurons."""
    wide = rows.pivot(index="fact", columns=["choice", "factor"], values="probability").loc[rows["fact"].unique()]
    units = rows[(rows["choice"] == "relevance") & (rows["factor"] == 0)].set_index("fact")["units"]
    keys = [("", 1.0), ("relevance", 0.0), ("relevance", factor), ("activation", 0.0), ("random", 0.0)]
    head = ["fact", "neurons by relevance", "as it is", "at 0", f"times {factor:g}", "by activation, at 0", "random, at 0"]
    lines = [[fact, units[fact], *(f"{wide.loc[fact, key]:.2f}" for key in keys)] for fact in wide.index]
    return markdown(pd.DataFrame(lines, columns=head))


def most_often(rows: pd.DataFrame, n: int = 4) -> str:
    """The neurons that are among those with the largest relevance for most facts."""
    chosen = rows[(rows["choice"] == "relevance") & (rows["factor"] == 0)]
    counts = chosen["units"].str.split(" ").explode().value_counts()
    return ", ".join(f"{unit} for {count} of {len(chosen)} facts" for unit, count in counts.head(n).items())


PAGE = """# Knowledge neurons

Measured with version {version} on {date}: {name}, float32, {n} of {tried} facts (capitals, languages, sights), those whose answer is the
model's most likely next token; ruleset `{rules}`, {k} neurons each, seed {seed}. This page is written by

    python -m analyses.benchmarks.knowledge_neurons --model {name} --rules {rules} --page docs/measurements/knowledge_neurons.md

For each fact the {k} MLP neurons with the largest relevance for the logit of its answer (summed over tokens) are held at 0, or multiplied
by {factor:g}, at all tokens. Controls: the {k} neurons with the largest activation (in magnitude, over all tokens but the first, or at the
last one), and {k} drawn at random (mean of {draws} draws).
In brackets: 95 % bootstrap intervals over facts.

{tables}

The same neurons come back: {often}.
A neuron that most facts share can say what kind of answer is asked for, but not which one.

Fact by fact, the probability of the answer:

{facts}

How it is done, step by step: [notebook 8](../../notebooks/8_knowledge_neurons.ipynb).
"""


def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name, a folder or a GGUF file.")],
    page: Annotated[Path, typer.Option(help="A .md for the tables.")],
    rules: Annotated[str, typer.Option(help="Ruleset for single runs.")] = "attnlrp",
    k: Annotated[int, typer.Option(help="Neurons of each fact.")] = 4,
    factor: Annotated[float, typer.Option(help="By which they are amplified.")] = 4.0,
    seed: Annotated[int, typer.Option(help="Of the random neurons.")] = 0,
) -> None:
    """Write the page."""
    torch.set_num_threads(1)
    loaded = load_model(model)
    rows = pd.DataFrame(measure(loaded, k=k, factor=factor, rules=rules, seed=seed))
    settings = dict(version=__version__, date=f"{datetime.now(UTC):%Y-%m-%d}", name=Path(model).name, rules=rules, k=k, seed=seed)
    settings |= dict(n=rows["fact"].nunique(), tried=len(facts()), factor=factor, draws=RANDOM)
    text = PAGE.format(**settings, tables=tables(rows, factor), often=most_often(rows), facts=per_fact(rows, factor))
    page.write_text(text)
    typer.echo(text)


if __name__ == "__main__":
    typer.run(main)
