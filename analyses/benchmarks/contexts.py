"""Which contexts of a neuron matter: those in which it is relevant, or those in which it is active?

    python -m analyses.benchmarks.contexts --model FOLDER [--text FILE] [--neurons 200 --windows 32] [--page docs/measurements/contexts.md]

AttnLRP's claim (Achtibat et al. 2024, section 4) is that relevance tells better what a unit is for than its activation. The test: in every
window of a corpus, set the neuron to zero and see how far the model's prediction behind the window falls (its logit less that of the
runner-up, both of the model as it is). For each neuron, Spearman's correlation over the windows between that effect and (a) its relevance,
(b) its largest activation; means over neurons drawn at random from every layer, with 95 % intervals over neurons. The corpus, unless one is
given, is the descriptions of the other packages that are installed, English that is the same wherever the same versions are; for the
embedded model, which knows few words, prompts of its task ioi.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from scipy.stats import rankdata
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tables import markdown, write_table
from analyses.contexts.corpus import texts_of, windows
from analyses.evaluation.agreement import correlation
from analyses.interventions import set_units
from analyses.models.loading import load_model
from analyses.models.structure import d_mlp, n_layers
from analyses.tasks import ioi
from lens_relevance import logit_diff, propagate
from lens_relevance.logit_reading import LogitReading
from lens_relevance.sites import anatomy

MEASURES = ("relevance", "activation", "|relevance|", "|activation|")
_RESAMPLES = 2000


def descriptions() -> Iterator[str]:
    """The prose of the installed packages' descriptions, package after package: paragraphs of 200 characters or more without markup.

    That of this package is left out: it changes with every version.
    """
    others = [one for one in distributions() if one.metadata["Name"] not in ("lens_relevance", "lens-relevance")]
    for package in sorted(others, key=lambda one: str(one.metadata["Name"]).lower()):
        metadata: Any = package.metadata
        text = metadata.get_payload() or metadata.get("Description") or ""
        for paragraph in str(text).split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) > 200 and not any(sign in words for sign in ("http", "```", "|", "::", "<", "=", "pip install", ">>>")):
                yield words


def known_sentences(model: TransformerBridge) -> Iterator[str]:
    """Prompts of the task ioi, of which a model that was trained on it knows all words."""
    yield from model.tokenizer.batch_decode(ioi(model, 64, seed=0).clean[:, 1:])


def measure(model: TransformerBridge, tokens: Tensor, n_neurons: int, *, rules: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Measures [measure, neuron, window] and effects [neuron, window] of neurons drawn at random, as many from each layer as can be."""
    chance, body = torch.Generator().manual_seed(seed), anatomy(model)
    layers = torch.arange(n_neurons) * n_layers(model) // n_neurons
    drawn = [(int(layer), int(torch.randint(d_mlp(model), (1,), generator=chance))) for layer in layers]
    with torch.no_grad():
        logits = model(tokens)[:, -1]
    target = logit_diff(*logits.topk(2, -1).indices.T)
    names = body.layout["neurons"]
    cache = propagate(model, tokens, target, rules=rules, names_filter=names)
    relevance = torch.stack([cache[names[layer]][..., i].sum(1) for layer, i in drawn])
    active = torch.stack([cache.activations[names[layer]][..., i].max(1).values for layer, i in drawn])
    size = torch.stack([cache.activations[names[layer]][..., i].abs().max(1).values for layer, i in drawn])
    reading = LogitReading(model, target.metric(model, tokens, torch.ones_like(tokens)), tokens.shape[1])
    effects, began = [], time.monotonic()
    with torch.no_grad(), reading.narrow():
        whole = reading.metric(model(tokens))
        for done, (layer, i) in enumerate(drawn):
            with set_units(model, {f"L{layer}N{i}": 0.0}):
                effects.append(whole - reading.metric(model(tokens)))
            if done % 20 == 19:
                print(f"{done + 1} of {n_neurons} neurons, {time.monotonic() - began:.0f} s", file=sys.stderr)
    effect = torch.stack(effects).double().numpy()
    measures = torch.stack([relevance, active, relevance.abs(), size]).double().numpy()
    return measures, effect


def table(measures: np.ndarray, effect: np.ndarray, *, seed: int) -> pd.DataFrame:
    """Mean over neurons of Spearman's correlation over windows, with intervals; signed measures with the effect, sizes with its size."""
    chance, rows, found = np.random.default_rng(seed), [], {}
    for name, values in zip(MEASURES, measures, strict=True):
        compared = np.abs(effect) if name.startswith("|") else effect
        found[name] = correlation(rankdata(values, axis=1), rankdata(compared, axis=1))
    told = ~np.isnan(np.stack(list(found.values()))).any(0)  # a measure that is the same in all windows ranks none
    found = {name: values[told] for name, values in found.items()}
    draws = chance.integers(told.sum(), size=(_RESAMPLES, told.sum()))
    found |= {"relevance - activation": found["relevance"] - found["activation"]}
    found |= {"|relevance| - |activation|": found["|relevance|"] - found["|activation|"]}
    for name, values in found.items():
        low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
        rows.append(
            {"measure": name, "neurons": int(told.sum()), "spearman": values.mean(), "low": low, "high": high, "worst neuron": values.min()}
        )
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as one reads it."""
    names = [name.replace("|relevance|", "size of relevance").replace("|activation|", "size of activation") for name in table["measure"]]
    means = zip(table["spearman"], table["low"], table["high"], strict=True)
    return pd.DataFrame(
        {
            "measure": [name.replace(" - ", " less ") for name in names],
            "Spearman (95 %)": [f"{mean:.3f} ({low:.3f} to {high:.3f})" for mean, low, high in means],
            "worst neuron": table["worst neuron"].map("{:.3f}".format),
            "neurons": table["neurons"],
        }
    )


def measured(model: TransformerBridge, texts: Iterator[str], *, neurons: int, n_windows: int, window: int, rules: str, seed: int) -> Any:
    """The table of windows drawn from a corpus, how many were drawn, and how many there are."""
    every = [one.tokens for one in windows(model, texts, window) if len(one.tokens) == window]
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:n_windows]
    measures, effect = measure(model, torch.stack([every[int(i)] for i in chosen]), neurons, rules=rules, seed=seed)
    return table(measures, effect, seed=seed), len(chosen), len(every)


def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name, a folder or a GGUF file.")] = "embedded",
    text: Annotated[Path | None, typer.Option(help="A corpus; the descriptions of the installed packages if left out.")] = None,
    neurons: Annotated[int, typer.Option(help="How many neurons.")] = 200,
    n_windows: Annotated[int, typer.Option("--windows", help="How many windows.")] = 32,
    window: Annotated[int, typer.Option(help="Tokens in a window, BOS included.")] = 24,
    rules: Annotated[str, typer.Option(help="Ruleset.")] = "attnlrp",
    seed: int = 0,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    loaded, name = load_model(model), Path(model).name
    texts, source = (known_sentences(loaded), "prompts of ioi") if model == "embedded" else (descriptions(), "the packages' descriptions")
    if text is not None:
        texts, source = texts_of(text), text.name
    found, drawn, every = measured(loaded, texts, neurons=neurons, n_windows=n_windows, window=window, rules=rules, seed=seed)
    written = markdown(shown(found))
    Console(soft_wrap=True).print(f"{name}, {neurons} neurons, {drawn} of {every} windows of {window} tokens, {rules}, seed {seed}")
    typer.echo(written)
    if page is not None:
        options = f"--model {name} --neurons {neurons} --windows {n_windows} --window {window} --rules {rules} --seed {seed}"
        corpus = "" if text is None else f" --text {text.name}"
        write_table(
            page,
            name,
            written,
            command=f"analyses.benchmarks.contexts {options}{corpus} --page docs/measurements/contexts.md",
            settings=f"{name}, {neurons} neurons from all layers, {drawn} of {every:,} windows of {window} tokens of {source}, relevance "
            f"under `{rules}`, seed {seed}; means over neurons, in brackets 95 % intervals over neurons",
        )


if __name__ == "__main__":
    typer.run(main)
