"""graph: the edges over which relevance flows for one prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from analyses.cli.app import app
from analyses.cli.options import (
    Against,
    Answer,
    Device,
    Dtype,
    Force,
    Model,
    Prompt,
    Rules,
    Seed,
    Task,
    TrustRemoteCode,
    Wrong,
    asked_question,
    clean_errors,
    say,
)


@app.command()
@clean_errors
def graph(
    *,
    model: Model = "embedded",
    rules: Rules = None,
    prompt: Prompt = None,
    answer: Answer = None,
    wrong: Wrong = None,
    against: Against = None,
    task: Task = None,
    top: Annotated[int, typer.Option(min=1, help="How many edges to keep.")] = 300,
    dictionary: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of sparse autoencoders or transcoders, whose features become nodes; several times for several."),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path,
        typer.Option(help="Where to: .html, .svg, .png, .json, .neuronpedia.json or .graphml; without an ending .html, .json, .graphml."),
    ] = Path("graph"),
    force: Force = False,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Draw the edges over which relevance flows through the model for one prompt, and list the strongest paths."""
    from analyses.graph import flow_graph
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.terminal import frame_table
    from lens_relevance import CoverageError, RelevanceError, read_dictionaries
    from lens_relevance.ruleset_tables import needs_reference, ruleset

    if out.suffix not in ("", ".html", ".svg", ".png", ".json", ".graphml"):
        raise RelevanceError(f"{out}: a graph is written as .html, .svg, .png, .json, .neuronpedia.json or .graphml")
    names = [out] if out.suffix else [out.with_suffix(ending) for ending in (".html", ".json", ".graphml")]
    files = [OutputFile(name, force=force) for name in names]
    dictionaries = [one for folder in dictionary or [] for one in read_dictionaries(folder)]
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    question = asked_question(loaded, prompt=prompt, answer=answer, wrong=wrong, against=against, task=task, n=1, seed=seed)
    pair, chosen = question.example, rules or "deeplift"
    reference = pair.corrupt if needs_reference(ruleset(chosen)) and not question.baseline else None
    flow = flow_graph(loaded, pair.clean, pair.target, rules=chosen, reference=reference, dictionaries=dictionaries).prune(top=top)
    try:
        flow = flow.annotated(loaded, pair.clean, dictionaries=dictionaries)
    except CoverageError as error:
        say(f"nodes are shown without what they write: {error}")
    Console().print(frame_table(flow.paths(10).round(4)[["share", "weakest", "path"]], "The strongest paths"))
    say("positions: " + "  ".join(f"{i} {token.strip()!r}" for i, token in enumerate(flow.tokens)))
    writers: dict[str, Callable[[Path], object]] = {".json": flow.to_json, ".graphml": flow.to_graphml}
    if out.name.endswith(".neuronpedia.json"):
        name = out.name.removesuffix(".neuronpedia.json")
        writers[".json"] = lambda path: flow.to_neuronpedia(path, slug=name, token_prob=question.probability(loaded))
    for file in files:
        file.write(writers.get(file.path.suffix) or flow.show().save)
    say(f"{', '.join(map(str, names))}: {len(flow.edges)} edges, {len(flow.nodes)} nodes, {question.target_in_words(loaded)}")
