"""Methods of token relevance, evaluated on models: faithfulness, plausibility, random weights, cost.

    python -m analyses.benchmarks.evaluation GEMMA STORIES --page docs/measurements/evaluation.md [--n 16 --randomised 4]

What `lens-relevance evaluate` prints for each model, as one page. A run that was stopped goes on where it was with the same --checkpoint;
methods that were added since are computed then.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer

from analyses.benchmarks.tables import markdown
from analyses.evaluation.evaluated_prompts import answered_pairs
from analyses.evaluation.token_relevance import TokenEvaluation, evaluate_token_relevance
from analyses.evaluation.token_tables import measures_frame, notes, randomised_frame
from analyses.models.loading import load_model
from analyses.tasks import PromptPairs
from lens_relevance import __version__


def section(name: str, words: str, pairs: PromptPairs, *, example: str, found: TokenEvaluation, randomised: int) -> str:
    """What was found on one model."""
    lines = [f"## {name}", f"{words[0].upper()}{words[1:]}, of {pairs.clean.shape[1]} tokens, for instance: “{example}”"]
    lines += [markdown(measures_frame(found)), "\n".join(f"- {note}" for note in notes(found))]
    if len(found.randomised):
        kinds = {
            "cascading": f"Random weights ({randomised} prompts), from the logits down to each part:",
            "independent": "Each part alone:",
        }
        for kind, title in kinds.items():
            lines += [title, markdown(randomised_frame(found, kind))]
    return "\n\n".join(lines)


PAGE = """# Token relevance, evaluated

Measured with version {version} on {date}, float32, one processor thread, seed {seed}. This page is written by

    python -m analyses.benchmarks.evaluation {names} --page docs/measurements/evaluation.md --n {n} --randomised {randomised}{limits}

and `lens-relevance evaluate --model ... --n {n} --randomised {randomised}` prints the same for any model and task.

The task: three sentences say where three people are, and the prompt asks for one of them. The target is the logit of the right place less
that of a place which is not named. Only prompts are taken that the model answers: the right place is its most likely next token, and with
the place in that sentence exchanged, the other place is. So the evidence is known: that place alone decides the answer.

- **SaCo** (Wu et al., CVPR 2024): ten groups of tokens by score, each removed alone; 1 if groups with larger scores cost the target more,
  weighted by the differences of the scores, -1 if the other way round.
- **faithfulness**: correlation (Bhatt et al. 2020), over 32 random subsets of a fifth of the tokens, of the sum of their scores with what
  the target loses without them.
- **comprehensive**, **sufficient** (ERASER, DeYoung et al. 2020): what the target loses (in logits) without the tokens with the largest
  scores, and with these alone; mean over the first 1, 5, 10, 20 and 50 % of them, rounded up. Low is good for sufficient.
- **AUPRC** (ERASER): average precision of the scores against the evidence. With one token of evidence it is 1 / its rank.
- **passes** through the model and **seconds** of processor time for one explanation, counted while it ran. Seconds depend on the machine
  and on what else runs on it.

A removed token's embedding is replaced by the mean embedding of the vocabulary (`analyses.perturbation`, `mean_embedding`). The first token
is never removed, and is no candidate. In brackets: 95 % bootstrap intervals over prompts. `random` is a random order, which every method
must beat; `occlusion` removes each token alone, with the operator that the measures use too, and so is hard to
beat in SaCo; a method that puts nearly all on one important token can be above it.

**Random weights** (Adebayo et al. 2018): the same prompts are explained on the model with weights drawn anew (normal, with mean and
deviation of each tensor). Spearman's correlation over tokens with the scores of the model as it is: near 0, if an explanation depends on
what was learnt. An output whose unembedding is tied to the embedding has a norm alone.

{sections}
"""


def main(
    models: Annotated[list[str], typer.Argument(help="Folders with models in Hugging Face format, or hub names.")],
    *,
    page: Annotated[Path, typer.Option(help="A .md for the tables.")],
    n: Annotated[int, typer.Option(help="Prompts.")] = 16,
    randomised: Annotated[int, typer.Option(help="Prompts that are explained with random weights.")] = 4,
    most_passes: Annotated[
        list[int] | None, typer.Option(help="Methods that take more passes for a prompt are left out: one number, or one for each model.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the task, of random subsets and of random weights.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="A folder, with one folder for each model.")] = None,
) -> None:
    """Write the page."""
    torch.set_num_threads(1)
    sections = []
    limits: list[int | None] = [*most_passes] if most_passes else [None]
    for name, limit in zip(models, limits * len(models) if len(limits) == 1 else limits, strict=True):
        model, short = load_model(name), Path(name).name
        pairs, words = answered_pairs(model, "question_answering", n, seed=seed)
        folder = None if checkpoint is None else checkpoint / short
        found = evaluate_token_relevance(model, pairs, randomised_prompts=randomised, most_passes=limit, seed=seed, checkpoint=folder)
        example = str(model.to_string(pairs.clean[0])).removeprefix(str(model.tokenizer.bos_token)).strip()
        sections.append(section(short, words, pairs, example=example, found=found, randomised=randomised))
        typer.echo(sections[-1])
    names, date = " ".join(Path(name).name for name in models), f"{datetime.now(UTC):%Y-%m-%d}"
    page.write_text(
        PAGE.format(
            **dict(version=__version__, date=date, seed=seed, names=names, n=n, randomised=randomised),
            limits="".join(f" --most-passes {limit}" for limit in most_passes or []),
            sections="\n\n".join(sections),
        )
    )


if __name__ == "__main__":
    typer.run(main)
