"""report, explain and graph: what was behind one answer of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from analyses.cli.options import (
    Against,
    Answer,
    Model,
    Number,
    Pairs,
    Prompt,
    Rules,
    Seed,
    Task,
    TrustRemoteCode,
    Wrong,
    app,
    asked_question,
    clean_errors,
    typed_command,
)


@app.command()
@clean_errors
def report(
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
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write one HTML page: words, layers and heads by relevance, beside activation patching, with the account. It opens offline."""
    from analyses.loading import load_model
    from analyses.report import find, report_page

    loaded = load_model(model, trust_remote_code)
    found = find(loaded, asked_question(loaded, prompt, answer, wrong, against, task, pairs, n, seed), rules, with_graph=True)
    report_page(found, typed_command()).save(out)
    typer.echo(f"{out}: {found.target}, {found.n_pairs} pair(s), heads agree with activation patching to Pearson {found.pearson:.3f}")


@app.command()
@clean_errors
def explain(
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
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show words, heads and the account in the terminal; with --method, words and heads by a method of token relevance."""
    from analyses.loading import load_model
    from analyses.report import find
    from analyses.report.terminal import show

    loaded = load_model(model, trust_remote_code)
    if method is None:
        show(find(loaded, asked_question(loaded, prompt, answer, wrong, against, task, pairs, n, seed), rules), Console())
        return
    from analyses.token_explanation import explain_tokens, reads_two_sets, target_of
    from lens_relevance import RelevanceError

    if against is not None:
        raise RelevanceError("--method explains one run; leave out --against, or leave out --method to compare two")
    asked: Any = prompt
    target: Any = None
    if prompt is not None:
        target = target_of(answer, wrong)
    elif reads_two_sets(loaded):
        raise RelevanceError("this model has an encoder and a decoder, which no task fits: give a --prompt")
    else:
        pair = asked_question(loaded, None, answer, wrong, None, task, pairs, n, seed).pairs[slice(0, 1)]
        asked, target = pair.clean, pair.target
    Console().print(explain_tokens(loaded, asked, target, method, rules or "gradient"))


@app.command()
@clean_errors
def graph(
    model: Model = "embedded",
    rules: Rules = None,
    prompt: Prompt = None,
    answer: Answer = None,
    wrong: Wrong = None,
    against: Against = None,
    task: Task = None,
    top: Annotated[int, typer.Option(min=1, help="How many edges to keep.")] = 300,
    seed: Seed = 0,
    out: Annotated[
        Path, typer.Option(help="Where to: .html, .svg, .png, .json or .graphml; without an ending, .html, .json and .graphml.")
    ] = Path("graph"),
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw the edges over which relevance flows through the model for one prompt, and list the strongest paths."""
    from analyses.graph import flow_graph
    from analyses.loading import load_model
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError, random_tokens
    from lens_relevance.rulesets import needs_reference, ruleset

    if out.suffix not in ("", ".html", ".svg", ".png", ".json", ".graphml"):
        raise RelevanceError(f"{out}: a graph is written as .html, .svg, .png, .json or .graphml")
    files = [out] if out.suffix else [out.with_suffix(ending) for ending in (".html", ".json", ".graphml")]
    loaded = load_model(model, trust_remote_code)
    question = asked_question(loaded, prompt, answer, wrong, against, task, None, 1, seed)
    pair, chosen = question.pairs[slice(0, 1)], rules or "deeplift"
    counterpart = random_tokens(8) if question.baseline else pair.corrupt
    reference = counterpart if needs_reference(ruleset(chosen)) else None
    found = flow_graph(loaded, pair.clean, pair.target, chosen, reference=reference).prune(top=top)
    for file in files:
        if file.suffix == ".json":
            found.to_json(file)
        elif file.suffix == ".graphml":
            found.to_graphml(file)
        else:
            found.show().save(file)
    Console().print(frame_table(found.paths(10).round(4)[["share", "weakest", "path"]], "The strongest paths"))
    typer.echo("positions: " + "  ".join(f"{i} {token.strip()!r}" for i, token in enumerate(found.tokens)))
    typer.echo(f"{', '.join(map(str, files))}: {len(found.edges)} edges, {len(found.nodes)} nodes, {question.target_in_words(loaded)}")
