"""Which attribution finds the patches and words that an answer rests on: the experiment on the vision-language model.

    python -m analyses.vision_language.experiment            # the table on the test split, as results.csv and results.md in this folder
    python -m analyses.vision_language.experiment --select   # every configuration on the training split, as selection.csv

For the logit of the model's answer against its runner-up, on questions that it answers right: patches (words) are removed most and least
relevant first; MoRF and LeRF are the areas under the two curves, `area` is the area between them (higher is better), each the mean over
three meanings of "removed". Localisation is the share of positive relevance that lies on the patches of the things asked for. Intervals
are 95 % bootstrap intervals over questions. Importance choices, rulesets and references are chosen by `area` on the training split.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from analyses.datasets.progress import progress_bar
from analyses.perturbation import EMBEDDING_BASELINES, PATCH_BASELINES, areas, curves_of
from analyses.perturbation.removal_runs import Removal
from analyses.vision_language import FOLDER, load_vision_language
from analyses.vision_language.methods import (
    Method,
    Scores,
    against,
    answers_of,
    by_attention,
    by_rules,
    inputs_of,
    occlusion,
    patch_removal,
    random_order,
    word_removal,
)
from analyses.vision_language.model import IMAGE, QUESTION, VisionLanguageModel
from analyses.vision_language.questions import Examples, examples

TRAINING_SPLIT, TEST_SPLIT = 11, 12  # seeds of the pictures
STEPS = 12  # in which all patches go
SINGLE_RULES = ("gradient", "attnlrp", "cp_lrp", "relp", "gim")

CANDIDATES: dict[str, Method] = {
    **{
        f"weighted accumulation, {i}, {r}": by_attention("weighted_accumulation", i, r)
        for i in ("relevance", "norm", "grad_norm")
        for r in SINGLE_RULES
    },
    **{f"Chefer 2021b, {r}": by_attention("chefer_2021b", rules=r) for r in SINGLE_RULES},
    **{f"Chefer 2021a, {r}": by_attention("chefer_2021a", rules=r) for r in SINGLE_RULES},
    **{f"LeGrad, {r}": by_attention("legrad", rules=r) for r in SINGLE_RULES},
    **{f"gradient x attention, {r}": by_attention("gradient_attention", rules=r) for r in SINGLE_RULES},
    **{f"{r}, {kind}": against(kind, r) for r in ("deeplift", "deeplift_ln") for kind in ("mean_patch", "blur", "other")},
}
# The best of each family on the training split, by area between the curves of patches; selection.csv has all of them.
CHOSEN = {
    "weighted accumulation": "weighted accumulation, grad_norm, attnlrp",
    "Chefer 2021b": "Chefer 2021b, attnlrp",
    "Chefer 2021a": "Chefer 2021a, gradient",
    "LeGrad": "LeGrad, relp",
    "gradient x attention": "gradient x attention, gim",
    "deeplift": "deeplift, mean_patch",
    "deeplift_ln": "deeplift_ln, blur",
}
METHODS: dict[str, Method] = {
    "random": random_order,
    "raw attention": by_attention("raw_attention"),
    "rollout": by_attention("rollout"),
    "attention flow": by_attention("attention_flow"),
    "gradient x attention": by_attention("gradient_attention"),
    "LeGrad": by_attention("legrad"),
    "Chefer 2021a": by_attention("chefer_2021a", rules="attnlrp"),
    "Chefer 2021b": by_attention("chefer_2021b"),
    "weighted accumulation": by_attention("weighted_accumulation"),
    **{rules: by_rules(rules) for rules in SINGLE_RULES},
    "occlusion": occlusion,
} | {name: CANDIDATES[name] for name in CHOSEN.values()}
RIVALS = ["weighted accumulation", "Chefer 2021b", CHOSEN["Chefer 2021b"], CHOSEN["Chefer 2021a"], "attnlrp", CHOSEN["deeplift"]]
INTRODUCTION = """# Which attribution finds what an answer rests on

`python -m analyses.vision_language.experiment`: {n} test questions that the model answers right. Areas under the curves of the answer's
logit less its runner-up's while patches (words) are removed, mean over three ways of removing; localisation is the share of positive
relevance on the patches of the things asked for; 95 % bootstrap intervals over questions. Rows with a comma are the best of their family
on the training split, where {tried} configurations were tried (selection.csv); the others are each method as its defaults have it (Chefer
2021a under attnlrp).
"""


def split(model: VisionLanguageModel, n: int, seed: int) -> Examples:
    """n questions that the model answers right."""
    drawn = examples(n + n // 5 + 9, seed)
    with torch.no_grad():
        right = model(**inputs_of(drawn))[:, -1].argmax(-1) == drawn.answers
    return drawn.rows(right.nonzero().flatten()[:n])


def localisation(scores: Float[Tensor, "n patch"], asked: Examples) -> Float[Tensor, " n"]:
    """Share of each question's positive relevance on the patches of the things asked for; 0 where none is positive."""
    positive = scores.double().clamp(min=0)
    total = positive.sum(1)
    return torch.where(total > 0, (positive * asked.relevant).sum(1) / total.clamp(min=1e-300), torch.zeros_like(total))


def measure(
    model: VisionLanguageModel, asked: Examples, methods: Mapping[str, Method], *, sets: tuple[str, ...] = (IMAGE, QUESTION)
) -> pd.DataFrame:
    """One row per token set, method, baseline and question: what `areas` gives, and for patches the localisation."""
    target, frames = answers_of(model, asked), []
    removals: list[Removal]
    with progress_bar() as bar:
        scores: dict[str, Scores] = {
            name: chosen(model, asked, target) for name, chosen in bar.track(list(methods.items()), description="attributions")
        }
    if IMAGE in sets:
        found = {name: one[IMAGE] for name, one in scores.items()}
        removals = [patch_removal(model, asked, target, baseline=baseline) for baseline in PATCH_BASELINES]
        table = areas(curves_of(found, torch.ones_like(asked.relevant), removals, steps=STEPS))
        where = {name: localisation(one, asked).numpy() for name, one in found.items()}
        table["localisation"] = [where[name][i] for name, i in zip(table["method"], table["example"], strict=True)]
        frames.append(table.assign(set=IMAGE))
    if QUESTION in sets:
        found = {name: one[QUESTION] for name, one in scores.items() if QUESTION in one}
        removals = [word_removal(model, asked, target, baseline=baseline) for baseline in EMBEDDING_BASELINES]
        removable = torch.ones_like(asked.questions).bool()
        removable[:, -1] = False  # the question mark, where the answer is read
        frames.append(areas(curves_of(found, removable, removals)).assign(set=QUESTION))
    return pd.concat(frames, ignore_index=True)


def condensed(table: pd.DataFrame, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Means over baselines and questions, with bootstrap intervals over questions for the area and the localisation."""
    figures = ["morf", "lerf", "area", "positive", "negative", "localisation"]
    means = table.groupby(["set", "method", "example"], sort=False)[figures].mean()
    rows = []
    for key, part in means.groupby(level=["set", "method"], sort=False):
        drawn = np.random.default_rng(seed).integers(len(part), size=(draws, len(part)))  # the same draws for every method
        row = dict(zip(("set", "method"), key, strict=True)) | part.mean().to_dict()
        for figure in ("area", "localisation"):
            row[f"{figure}_low"], row[f"{figure}_high"] = np.quantile(part[figure].to_numpy()[drawn].mean(1), [0.025, 0.975])
        rows.append(row | {"questions": len(part)})
    return pd.DataFrame(rows).sort_values(["set", "area"], ascending=[True, False], ignore_index=True)


def markdown(table: pd.DataFrame) -> str:
    """The table as it stands in results.md, by area of patches."""
    of_words = {row["method"]: interval(row, "area") for row in table[table["set"] == QUESTION].to_dict("records")}
    lines = ["| method | MoRF | LeRF | area between | localisation | words: area between |", "|---|---|---|---|---|---|"]
    for row in table[table["set"] == IMAGE].to_dict("records"):
        cells = [f"{row['morf']:.2f}", f"{row['lerf']:.2f}", *(interval(row, figure) for figure in ("area", "localisation"))]
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {of_words[row['method']]} |")
    return "\n".join(lines) + "\n"


def interval(row: dict[Hashable, Any], figure: str) -> str:
    """A figure with its interval."""
    return f"{row[figure]:.2f} ({row[f'{figure}_low']:.2f} to {row[f'{figure}_high']:.2f})"


def differences(table: pd.DataFrame, first: str, others: list[str], *, draws: int = 2000, seed: int = 0) -> str:
    """How much more area one method has than others on the same questions, with paired bootstrap intervals, a line for each token set."""
    lines = []
    for name, part in table.groupby("set", sort=False):
        wide = part.pivot_table(index="example", columns="method", values="area")
        drawn = np.random.default_rng(seed).integers(len(wide), size=(draws, len(wide)))
        cells = []
        for other in others:
            gain = (wide[first] - wide[other]).to_numpy()
            low, high = np.quantile(gain[drawn].mean(1), [0.025, 0.975])
            cells.append(f"{other} {gain.mean():+.2f} ({low:+.2f} to {high:+.2f})")
        lines.append(f"Area of {first}, {name}, less that of: {'; '.join(cells)}.")
    return "\n\n".join(lines) + "\n"


def main(
    select: Annotated[bool, typer.Option("--select", help="Every configuration on the training split, instead of the table.")] = False,
    questions: Annotated[int, typer.Option(help="How many.")] = 600,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = FOLDER,
) -> None:
    """Run the experiment."""
    torch.set_num_threads(1)
    started, model = time.perf_counter(), load_vision_language()
    if select:
        found = condensed(measure(model, split(model, questions // 2, TRAINING_SPLIT), CANDIDATES))
        found.to_csv(out / "selection.csv", index=False, float_format="%.4f")
        text = markdown(found)
    else:
        table = measure(model, split(model, questions, TEST_SPLIT), METHODS)
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        condensed(table).assign(measured=today).to_csv(out / "results.csv", index=False, float_format="%.4f")
        text = markdown(pd.read_csv(out / "results.csv")) + "\n" + differences(table, CHOSEN["weighted accumulation"], RIVALS)
        (out / "results.md").write_text(f"{INTRODUCTION.format(n=questions, tried=len(CANDIDATES))}\n{text}")
    print(text)
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
