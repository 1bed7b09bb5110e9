"""report: one HTML page about one question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from analyses.cli.app import app
from analyses.cli.options import (
    Against,
    Answer,
    Device,
    Dtype,
    Force,
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
    say,
    typed_command,
)


@app.command()
@clean_errors
def report(
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
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    atlas: Annotated[Path | None, typer.Option(help="Also the heads' best contexts in an atlas (lens-relevance contexts).")] = None,
    force: Force = False,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML page: words, layers and heads by relevance, beside activation patching, with the account. It opens offline."""
    from analyses.contexts import Atlas
    from analyses.evaluation.agreement import correlation_in_words
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report import find, report_page

    file = OutputFile(out, force=force)
    contexts = None if atlas is None else Atlas.load(atlas)
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    question = asked_question(loaded, prompt=prompt, answer=answer, wrong=wrong, against=against, task=task, pairs=pairs, n=n, seed=seed)
    findings = find(loaded, question, rules or "deeplift", with_graph=True, atlas=contexts)
    pearson = correlation_in_words(findings.pearson)
    say(f"{out}: {findings.target}, {findings.n_pairs} pair(s), heads agree with activation patching to Pearson {pearson}")
    file.write(report_page(findings, typed_command()).save)
