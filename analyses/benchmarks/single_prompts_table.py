"""The page of `single_prompts`: every method on every model, with intervals and paired differences from the default of `propagate`.

    python -m analyses.benchmarks.single_prompts_table RESULTS.csv ... --page docs/measurements/single_prompts.md

A prompt's number is the mean of its eight areas (two targets, four ways of removing). Intervals are bootstrapped over prompts (4,000
draws). Over models, areas count in parts of their model's mean over all methods but random order, gradient and occlusion, so that one
model's logits do not outweigh another's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from analyses.benchmarks.single_prompts import BASELINES, OCCLUSION

DRAWS, SEED = 4000, 0
DEFAULT = "deeplift, mean embedding"
PLAIN_QK = "attnlrp, plain q/k norms where there are any"
NO_METHODS = ("random", "gradient", "occlusion")


def by_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    """[model, source, prompt] x method: the mean area of each prompt."""
    table = rows[rows["baseline"] != OCCLUSION].pivot_table(index=["model", "source", "prompt"], columns="method", values="area")
    plain = table.get("attnlrp_plain_qk", pd.Series(np.nan, table.index))
    return table.assign(**{PLAIN_QK: plain.fillna(table["attnlrp"])})


def interval(values: pd.Series | np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean, and the bootstrap interval of the mean over prompts."""
    given = np.asarray(values, dtype=float)
    drawn = given[np.random.default_rng(SEED).integers(len(given), size=(DRAWS, len(given)))].mean(1)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(given.mean()), float(low), float(high)


def over_models(table: pd.DataFrame, method: str, other: str | None = None, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean over models of a method, less that of another, in parts of each model's mean over methods; prompts are drawn within models."""
    rng, draws, means = np.random.default_rng(SEED), [], []
    for _, part in table.groupby(level="model"):
        scale = part.drop(columns=[*NO_METHODS, PLAIN_QK], errors="ignore").mean().mean()
        values = (part[method] - (part[other] if other else 0)).to_numpy() / scale
        means.append(values.mean())
        draws.append(values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1))
    low, high = np.quantile(np.mean(draws, axis=0), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(np.mean(means)), float(low), float(high)


def shown(three: tuple[float, float, float]) -> str:
    """Mean and interval as they stand in tables."""
    return "–" if np.isnan(three[0]) else f"{three[0]:.2f} ({three[1]:.2f} to {three[2]:.2f})"


def model_table(rows: pd.DataFrame) -> str:
    """One model: mean area with its interval, its two targets and four ways of removing, and the correlation with occlusion."""
    areas = rows[rows["baseline"] != OCCLUSION]
    means = areas.groupby(["source", "prompt", "method"])["area"].mean().unstack()
    targets, removals = (areas.pivot_table(index="method", columns=name, values="area") for name in ("target", "baseline"))
    occlusion = rows[rows["baseline"] == OCCLUSION].groupby("method")["area"].mean()
    lines = []
    for method in means.mean().sort_values(ascending=False).index:
        parts = [*(targets.loc[method, name] for name in ("logit", "difference")), *(removals.loc[method, name] for name in BASELINES)]
        parts = [f"{value:.2f}" for value in (*parts, occlusion[method])]
        lines.append(f"| {method} | {shown(interval(means[method]))} | {' | '.join(parts)} |")
    head = "| method | mean area | logit | difference | zero | mean | random | left out | r with occlusion |"
    return "\n".join([head, "|---" * 9 + "|", *lines])


def default_table(table: pd.DataFrame) -> str:
    """Differences of methods from the default on each model and over models, at 95 % for all methods together (Bonferroni)."""
    methods = [name for name in table.columns if name not in (*NO_METHODS, DEFAULT, "attnlrp_plain_qk")]
    confidence = 1 - 0.05 / len(methods)
    models = list(table.index.unique("model"))
    order = sorted(methods, key=lambda name: -over_models(table, name, DEFAULT)[0])
    lines = [f"| method less the default | {' | '.join(models)} | over models |", "|---" * (len(models) + 2) + "|"]
    for name in order:
        cells = [shown(interval((part[name] - part[DEFAULT]), confidence)) for part in (table.loc[[model]] for model in models)]
        lines.append(f"| {name} | {' | '.join(cells)} | {shown(over_models(table, name, DEFAULT, confidence))} |")
    return "\n".join(lines)


def page(rows: pd.DataFrame) -> str:
    """The page."""
    sections = []
    for model, part in rows.groupby("model"):
        counts = ", ".join(f"{n} {source}" for source, n in part.groupby("source")["prompt"].nunique().items())
        sections.append(f"## {model}\n\nPrompts: {counts}.\n\n{model_table(part)}")
    return _PAGE.format(tables="\n\n".join(sections), default=default_table(by_prompt(rows)), name=DEFAULT)


_PAGE = """# Single prompts: removing tokens

Measured with version 0.1.0 on 2026-11-22 on two CPU cores, float32. This page is rebuilt by

    python -m analyses.benchmarks.single_prompts --model GEMMA --results single_prompts.csv --steps 6
    python -m analyses.benchmarks.single_prompts --model STORIES --results single_prompts.csv --texts 48 --seed 0
    python -m analyses.benchmarks.single_prompts --model STORIES --results single_prompts.csv --texts 48 --seed 1
    python -m analyses.benchmarks.single_prompts_table single_prompts.csv --page docs/measurements/single_prompts.md

Tokens are removed most and least relevant first; the area lies between the two curves of the target over the share of tokens removed, in
logits. What is explained: the logit of the model's top prediction, and its difference from the runner-up's. What stands where a token was:
zero, the mean embedding of the vocabulary, a random token, or nothing (the rest moves together). The first token stays. Where fewer than
the 60 written prompts were run, they are the first, and the kinds take turns. In brackets: 95 %
bootstrap intervals over prompts. Written prompts (`single_prompts_texts.py`) are of five kinds: facts, pronouns, agreement, indirect
objects and continuations; sampled ones are drawn from the model itself.

{tables}

## Which one by default

Paired differences from {name}. Intervals hold for all
methods together (95 %, Bonferroni); over models each counts in parts of its own mean over methods.

{default}

`deeplift` against the mean embedding is first on Gemma and level with the best on the small model; over both no other is ahead. It is
what `propagate`, `lens-relevance explain` and `lens-relevance report` do where neither a ruleset nor a reference is named: two forwards
and one backward, for relevance that adds up to the difference from the run on the mean embedding. `random_tokens(4)` or `(8)` are level
with it for four and eight times the work. Of the rulesets that need one run alone `attnlrp` is first or tied on both models, on Gemma with
plain norms of queries and keys (`attnlrp_plain_qk`); explain and report say where its tokens carry less than half of the target, or the
first token has most of the relevance.
"""


def main(
    results: Annotated[list[Path], typer.Argument(help="Files of single_prompts.")],
    *,
    write_to: Annotated[Path, typer.Option("--page", help="A .md for the tables.")],
) -> None:
    """Write the page."""
    write_to.write_text(page(pd.concat([pd.read_csv(file) for file in results], ignore_index=True)))


if __name__ == "__main__":
    typer.run(main)
