"""explain: words, heads and the account in the terminal."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import (
    Against,
    Answer,
    Device,
    Dtype,
    Model,
    Number,
    Pairs,
    Prompt,
    Rules,
    Seed,
    Task,
    TrustRemoteCode,
    Wrong,
    asked_question,
    clean_errors,
)


@app.command()
@clean_errors
def explain(
    *,
    model: Model = "embedded",
    rules: Rules = None,
    prompt: Prompt = None,
    answer: Answer = None,
    wrong: Wrong = None,
    against: Against = None,
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 32,
    seed: Seed = 0,
    method: Annotated[
        str | None,
        typer.Option(help="By attention instead: weighted_accumulation, chefer, rollout, ...; also on T5 and BART."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show words, heads and the account in the terminal; with --method, words and heads by a method of token relevance."""
    from analyses.models.loading import load_model
    from analyses.report import find
    from analyses.report.terminal import show

    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    if method is None:
        question = asked_question(
            loaded, prompt=prompt, answer=answer, wrong=wrong, against=against, task=task, pairs=pairs, n=n, seed=seed
        )
        show(find(loaded, question, rules or "deeplift"), Console())
        return
    from analyses.models.structure import check_answers_text
    from analyses.report.token_explanation import explain_tokens, reads_two_sets, target_of
    from lens_relevance import RelevanceError

    check_answers_text(loaded)
    if against is not None:
        raise RelevanceError("--method explains one run; leave out --against, or leave out --method to compare two")
    asked: Any = prompt
    target: Any = None
    if prompt is not None:
        target = target_of(answer, wrong)
    elif reads_two_sets(loaded):
        raise RelevanceError("this model has an encoder and a decoder, which no task fits: give a --prompt")
    else:
        pair = asked_question(loaded, answer=answer, wrong=wrong, task=task, pairs=pairs, n=n, seed=seed).example
        asked, target = pair.clean, pair.target
    Console().print(explain_tokens(loaded, asked, target, method=method, rules=rules))
