"""evaluate: methods of token relevance by faithfulness, plausibility, random weights and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import Checkpoint, Device, Dtype, Force, Model, Pairs, Seed, TrustRemoteCode, clean_errors, say


@app.command()
@clean_errors
def evaluate(
    *,
    model: Model = "embedded",
    methods: Annotated[str | None, typer.Option(help="Comma-separated rulesets and methods of token relevance; all if left out.")] = None,
    task: Annotated[
        str | None, typer.Option(help="A task, of which the pairs that the model gets right are taken; question_answering if left out.")
    ] = None,
    pairs: Pairs = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts of your own, without evidence: .txt, a line each.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many prompts of the task.")] = 16,
    baseline: Annotated[
        str, typer.Option(help="What takes the place of a removed token: mean_embedding, zero_embedding, random_tokens, pad_token, delete.")
    ] = "mean_embedding",
    randomised: Annotated[int, typer.Option(min=0, help="Prompts that are explained again with random weights; 0: none.")] = 8,
    most_passes: Annotated[int | None, typer.Option(help="Leave out methods that take more passes than this for a prompt.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="A .csv for the table.")] = None,
    force: Force = False,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Evaluate every method of token relevance on the same prompts: is it faithful, does it find the evidence, does it see the weights?

    lens-relevance evaluate --model gpt2 --n 16
    """
    from analyses.contexts.corpus import texts_of
    from analyses.datasets.processes import processes
    from analyses.evaluation.evaluated_prompts import answered_pairs, prompts_alone
    from analyses.evaluation.token_relevance import COLUMNS, evaluate_token_relevance
    from analyses.evaluation.token_tables import measures_frame, notes, randomised_frame
    from analyses.models.loading import load_model
    from analyses.models.structure import check_answers_text, n_layers
    from analyses.output_files import OutputFile
    from analyses.perturbation import BASELINES
    from analyses.report.terminal import frame_table
    from analyses.tasks import PromptPairs
    from lens_relevance import RelevanceError

    if sum(given is not None for given in (task, pairs, prompts)) > 1:
        raise RelevanceError("give one of --task, --pairs and --prompts")
    if baseline not in BASELINES:
        raise RelevanceError(f"unknown baseline {baseline!r}; choose one of {', '.join(BASELINES)}")
    file = None if out is None else OutputFile(out, force=force, columns=COLUMNS)
    here = processes()
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    check_answers_text(loaded)
    n_layers(loaded)
    if prompts is not None:
        chosen, words = prompts_alone(loaded, list(texts_of(prompts))), str(prompts)
    elif pairs is not None:
        chosen, words = PromptPairs.from_file(loaded, pairs), str(pairs)
    else:
        chosen, words = answered_pairs(loaded, task, n, seed=seed)
    found = evaluate_token_relevance(
        loaded,
        chosen,
        None if methods is None else [name.strip() for name in methods.split(",")],
        baseline=baseline,
        randomised_prompts=randomised,
        most_passes=most_passes,
        seed=seed,
        checkpoint=checkpoint,
    )
    if here.index:
        return  # every process has the result; the first one speaks
    console = Console()
    console.print(frame_table(measures_frame(found, between="\n"), f"Token relevance, {words}; removed: {baseline}"))
    kinds = {"cascading": "from the logits down to here", "independent": "here alone"} if len(found.randomised) else {}
    for kind, where in kinds.items():
        console.print(frame_table(randomised_frame(found, kind), f"Spearman with the scores of a model whose weights are random {where}"))
    for line in notes(found):
        say(line)
    if file is not None:
        file.write_table(found.table)
