"""The command `lens-relevance`."""

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
    from analyses.report import Question

# torch and transformers take seconds to import, so each command imports what it needs: --help answers at once.

app = typer.Typer(
    help="What a language model looks at: relevance of words, heads and neurons, checked by activation patching.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option(help="'embedded', a folder with a model in Hugging Face format, or a hub name.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's repository run its own code.")]
Rules = Annotated[str | None, typer.Option(help="Ruleset: deeplift (default), attnlrp, cp_lrp, relp, gim, gradient, ...")]
Prompt = Annotated[str | None, typer.Option(help="A prompt of your own, in place of a task.")]
Answer = Annotated[str | None, typer.Option(help="The token whose logit is explained; by default the model's own prediction.")]
Wrong = Annotated[str | None, typer.Option(help="The token it is weighed against.")]
Against = Annotated[str | None, typer.Option(help="A counterpart of equally many tokens; random words if left out.")]
Task = Annotated[
    str | None,
    typer.Option(help="ioi, pronoun, induction, greater_than, agreement or docstring; by default the first of ioi and pronoun that fits."),
]
Pairs = Annotated[Path | None, typer.Option(help="Pairs of your own: .csv or .jsonl with the columns clean, corrupt, answer, wrong.")]
Number = Annotated[int, typer.Option("--n", min=1, help="How many pairs of the task.")]
Checkpoint = Annotated[Path | None, typer.Option(help="A folder: an interrupted run, started again with it, goes on where it stopped.")]
Seed = Annotated[int, typer.Option(help="Seed of the task's draw.")]


def clean_errors(command: Callable[..., None]) -> Callable[..., None]:
    """What lens_relevance objects to is shown as a message, not as a traceback; exit code 2. Warnings are one line each."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        console = Console(stderr=True, soft_wrap=True)

        def one_line(message: Warning | str, *_: Any, **__: Any) -> None:
            console.print("Warning:", str(message), style="yellow", markup=False, highlight=False)

        from lens_relevance import RelevanceError

        with warnings.catch_warnings():
            warnings.showwarning = one_line
            try:
                command(*args, **kwargs)
            except (RelevanceError, OSError) as error:
                console.print("Error:", str(error), style="red", markup=False, highlight=False)
                raise typer.Exit(2) from None

    return wrapped


def _question(
    model: Any,
    prompt: str | None,
    answer: str | None,
    wrong: str | None,
    against: str | None,
    task: str | None,
    pairs: Path | None,
    n: int,
    seed: int,
) -> Question:
    """What the options ask."""
    from analyses.report import from_pairs, from_prompt, from_task
    from analyses.tasks import PromptPairs
    from lens_relevance import RelevanceError

    if sum(given is not None for given in (prompt, task, pairs)) > 1:
        raise RelevanceError("give one of --prompt, --task and --pairs")
    if prompt is None:
        if stray := [name for name, given in {"--answer": answer, "--wrong": wrong, "--against": against}.items() if given is not None]:
            raise RelevanceError(f"{stray[0]} goes with --prompt")
        return from_task(model, task, n, seed) if pairs is None else from_pairs(PromptPairs.from_file(model, pairs), str(pairs))
    return from_prompt(model, prompt, answer, wrong, against)


def _command() -> str:
    """What was typed, so that it can be typed again."""
    return shlex.join(["lens-relevance", *sys.argv[1:]])


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
    found = find(loaded, _question(loaded, prompt, answer, wrong, against, task, pairs, n, seed), rules, with_graph=True)
    report_page(found, _command()).save(out)
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
        show(find(loaded, _question(loaded, prompt, answer, wrong, against, task, pairs, n, seed), rules), Console())
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
        pair = _question(loaded, None, answer, wrong, None, task, pairs, n, seed).pairs[slice(0, 1)]
        asked, target = pair.clean, pair.target
    Console().print(explain_tokens(loaded, asked, target, method, rules or "gradient"))


@app.command()
@clean_errors
def rank(
    what: Annotated[str, typer.Argument(help="heads or neurons")] = "heads",
    model: Model = "embedded",
    method: Annotated[str, typer.Option(help="A ruleset, eap_ig, conductance, weighted_accumulation, ...")] = "deeplift",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 32,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="How many to show.")] = 20,
    out: Annotated[Path | None, typer.Option(help="A .csv to write all of them to.")] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Check the ranking: ablate its top, and as many at random.")] = False,
    checkpoint: Checkpoint = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Rank heads or neurons over pairs of prompts."""
    from analyses.loading import load_model
    from analyses.processes import processes
    from analyses.ranking import rank_heads, rank_neurons
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError

    if what not in ("heads", "neurons"):
        raise RelevanceError(f"rank heads or neurons, not {what!r}")
    here = processes()
    loaded = load_model(model, trust_remote_code)
    question = _question(loaded, None, None, None, None, task, pairs, n, seed)
    ranking = (rank_heads if what == "heads" else rank_neurons)(loaded, question.pairs, method, ablate=ablate, checkpoint=checkpoint)
    if here.index:
        return  # every process has the result; the first one speaks
    Console().print(frame_table(ranking.head(top), f"{what} by {method}: {question.words}"))
    if ablate:
        typer.echo(str(ranking.attrs["ablation"]))
    if out is not None:
        ranking.to_csv(out, index=False)


@app.command()
@clean_errors
def compare(
    model: Model = "embedded",
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated rulesets, eap_ig, conductance, weighted_accumulation, ...; all if left out.")
    ] = None,
    components: Annotated[str, typer.Option(help="Comma-separated: resid, attn, mlp, heads.")] = "resid,attn,mlp,heads",
    direction: Annotated[str, typer.Option(help="The yardstick: denoising, noising, or the mean of both.")] = "mean",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 64,
    seed: Seed = 0,
    out: Annotated[Path, typer.Option(help="The page to write; with the ending .csv the table alone.")] = Path("comparison.html"),
    checkpoint: Checkpoint = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Hold every method against activation patching, and write the table as a page."""
    from analyses.comparison import METHODS
    from analyses.comparison import compare as compare_methods
    from analyses.loading import load_model
    from analyses.processes import processes
    from analyses.report.comparison_page import best_methods, comparison_page, correlation_table
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError
    from lens_relevance.targets import describe

    if direction not in ("denoising", "noising", "mean"):
        raise RelevanceError(f"direction is denoising, noising or mean, not {direction!r}")
    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",")]
    here = processes()
    loaded = load_model(model, trust_remote_code)
    question = _question(loaded, None, None, None, None, task, pairs, n, seed)
    wanted = [name.strip() for name in components.split(",")]
    found = compare_methods(loaded, question.pairs, chosen, wanted, direction, checkpoint=checkpoint)  # type: ignore[arg-type]
    if here.index:
        return  # every process has the result; the first one speaks
    if out.suffix == ".csv":
        found.table.to_csv(out, index=False)
    else:
        comparison_page(found, model, describe(question.pairs.target, loaded), question.words, _command()).save(out)
    console = Console()
    console.print(
        frame_table(correlation_table(found.table, brief=True), f"Pearson with activation patching ({direction}), {question.words}")
    )
    console.print(frame_table(best_methods(found.table), "Best"))
    console.print(f"patching itself: {found.patching_seconds:.1f} s; all figures: {out}", markup=False, highlight=False)


@app.command()
@clean_errors
def coverage(
    model: Model = "embedded",
    sites: Annotated[bool, typer.Option("--sites", help="List every site too.")] = False,
    out: Annotated[Path | None, typer.Option(help="A .csv with all sites and rulesets.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which rulesets work on a model, and where it has parts without a rule."""
    from analyses.loading import load_model
    from analyses.report.terminal import frame_table
    from lens_relevance import coverage as covered

    found = covered(load_model(model, trust_remote_code))
    console = Console()
    console.print(frame_table(found.rulesets, f"Rulesets on {model}"))
    for part, reason in found.uncovered.items():
        console.print(f"no site: {part}: {reason}", markup=False, highlight=False)
    if sites:
        console.print(
            frame_table(found.sites[["site", "operation", "live", "off", "deeplift", "attnlrp"]], "Sites, with the rules of two rulesets")
        )
    if out is not None:
        found.sites.to_csv(out, index=False)


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
    question = _question(loaded, prompt, answer, wrong, against, task, None, 1, seed)
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


@app.command()
@clean_errors
def circuit(
    model: Model = "embedded",
    methods: Annotated[str | None, typer.Option(help="Comma-separated rulesets, eap_ig, patching, random; all if left out.")] = None,
    level: Annotated[str, typer.Option(help="node or edge: what a circuit is made of.")] = "node",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 16,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="A .csv to write the table to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How faithful the circuits are that each method finds: everything outside a circuit is set to the counterpart's value.

    Circuits are found on one half of the pairs and evaluated on the other.
    """
    from analyses.circuits import faithfulness_table
    from analyses.circuits.faithfulness import METHODS
    from analyses.loading import load_model
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError

    if level not in ("node", "edge"):
        raise RelevanceError(f"level is node or edge, not {level!r}")
    loaded = load_model(model, trust_remote_code)
    question = _question(loaded, None, None, None, None, task, pairs, n, seed)
    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",")]
    half = len(question.pairs) // 2
    if half == 0:
        raise RelevanceError("circuits are found on one half of the pairs and evaluated on the other, so there must be two pairs or more")
    found_on, held_out = question.pairs[slice(0, half)], question.pairs[slice(half, None)]
    table = faithfulness_table(loaded, found_on, chosen, level, held_out=held_out)  # type: ignore[arg-type]
    if out is not None:
        table.to_csv(out, index=False)
    title = (
        f"Circuits of {level}s, {question.title}: found on {half} pairs (selection_cmd), CMD (0 is best) and CPR on {len(held_out)} others"
    )
    Console().print(frame_table(table.round(4), title))
