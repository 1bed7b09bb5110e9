"""What the commands share: their options, how errors are shown, and the question that the options ask."""

from __future__ import annotations

import functools
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from analyses.report import Question

# torch and transformers take seconds to import, so each command imports what it needs: --help answers at once.

Model = Annotated[str, typer.Option(help="'embedded', a folder with a model in Hugging Face format, a .gguf file, or a hub name.")]
Dtype = Annotated[str, typer.Option(help="Of the model's weights: float32, bfloat16, float16 or float64.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ..., or auto to spread the model over all there are; a GPU by itself if there is one."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own code.")]
Rules = Annotated[str | None, typer.Option(help="Ruleset: deeplift (default), attnlrp, cp_lrp, relp, gim, gradient, ...")]
Prompt = Annotated[str | None, typer.Option(help="A prompt of your own, in place of a task.")]
Answer = Annotated[str | None, typer.Option(help="The token whose logit is explained; by default the model's own prediction.")]
Wrong = Annotated[str | None, typer.Option(help="The token it is weighed against.")]
Against = Annotated[
    str | None,
    typer.Option(help="A counterpart of equally many tokens; the mean embedding if left out."),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="ioi, pronoun, induction, greater_than, agreement, docstring, mcqa, question_answering, arithmetic_addition or "
        "arithmetic_subtraction; by default the first of ioi and pronoun that fits."
    ),
]
Pairs = Annotated[Path | None, typer.Option(help="Pairs of your own: .csv or .jsonl with the columns clean, corrupt, answer, wrong.")]
Number = Annotated[int, typer.Option("--n", min=1, help="How many pairs of the task.")]
Checkpoint = Annotated[Path | None, typer.Option(help="A folder: an interrupted run, started again with it, goes on where it stopped.")]
Seed = Annotated[int, typer.Option(help="Seed of the task's draw.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what --out names, even if it was not written by lens-relevance.")]


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What lens_relevance objects to is shown as a message, not as a traceback; exit code 2. Warnings are one line each."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from lens_relevance.shown_text import let_any_text_be_printed, visible

        let_any_text_be_printed()
        console = Console(stderr=True, soft_wrap=True)

        def one_line(message: Warning | str, *_: Any, **__: Any) -> None:
            console.print("Warning:", visible(message), style="yellow", markup=False, highlight=False)

        from lens_relevance import RelevanceError

        with warnings.catch_warnings():
            warnings.showwarning = one_line
            try:
                command(*args, **kwargs)
            except (RelevanceError, OSError) as error:
                console.print("Error:", visible(error), style="red", markup=False, highlight=False)
                raise typer.Exit(2) from None

    return wrapped


def say(text: object) -> None:
    """Print a line as it is: no markup, no line breaks of its own."""
    from lens_relevance.shown_text import visible

    Console(soft_wrap=True).print(visible(text), markup=False, highlight=False, emoji=False)


def asked_question(
    model: TransformerBridge,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    wrong: str | None = None,
    against: str | None = None,
    task: str | None = None,
    pairs: Path | None = None,
    n: int,
    seed: int,
) -> Question:
    """What the options ask."""
    from analyses.models.structure import check_answers_text, n_layers
    from analyses.report import from_pairs, from_prompt, from_task
    from analyses.tasks import PromptPairs
    from lens_relevance import RelevanceError

    check_answers_text(model)
    n_layers(model)
    if sum(given is not None for given in (prompt, task, pairs)) > 1:
        raise RelevanceError("give one of --prompt, --task and --pairs")
    if prompt is None:
        if stray := [name for name, given in {"--answer": answer, "--wrong": wrong, "--against": against}.items() if given is not None]:
            raise RelevanceError(f"{stray[0]} goes with --prompt")
        return from_task(model, task, n, seed=seed) if pairs is None else from_pairs(PromptPairs.from_file(model, pairs), str(pairs))
    return from_prompt(model, prompt, answer, wrong=wrong, against=against)


def typed_command() -> str:
    """What was typed, so that it can be typed again."""
    return shlex.join(["lens-relevance", *sys.argv[1:]])
