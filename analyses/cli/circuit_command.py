"""circuit: how faithful the circuits of each method are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from analyses.cli.app import app
from analyses.cli.options import (
    Checkpoint,
    Device,
    Dtype,
    Force,
    Model,
    Number,
    Pairs,
    Seed,
    Task,
    TrustRemoteCode,
    asked_question,
    clean_errors,
)

MIB_MODELS = {
    "gpt2": "gpt2",
    "openai-community/gpt2": "gpt2",
    "Qwen/Qwen2.5-0.5B": "qwen2.5",
    "google/gemma-2-2b": "gemma2",
    "meta-llama/Llama-3.1-8B": "llama3",
}
"""What MIB calls the models of its leaderboard."""


@app.command()
@clean_errors
def circuit(
    *,
    model: Model = "embedded",
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated rulesets, eap_ig, conductance, patching, random; several if left out.")
    ] = None,
    level: Annotated[str, typer.Option(help="node or edge: what a circuit is made of.")] = "node",
    task: Task = None,
    pairs: Pairs = None,
    n: Number = 16,
    seed: Seed = 0,
    size: Annotated[int | None, typer.Option(min=1, help="Also list a circuit: of how many items, by the first method.")] = None,
    frequency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Of these, those among the strongest in this share of resamples of the pairs.")
    ] = 0.9,
    out: Annotated[Path | None, typer.Option(help="A .csv to write the table to.")] = None,
    force: Force = False,
    mib: Annotated[
        Path | None,
        typer.Option(help="A folder for a MIB submission: scores on all pairs, as METHOD_patching_LEVEL/TASK_MODEL/importances.json."),
    ] = None,
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """How faithful the circuits are that each method finds: everything outside a circuit is set to the counterpart's value.

    Circuits are found on one half of the pairs and evaluated on the other.
    """
    from analyses.circuits import Ablation, faithfulness_table, frequent, score_items
    from analyses.circuits.methods_compared import METHODS
    from analyses.models.loading import load_model
    from analyses.output_files import OutputFile
    from analyses.report.terminal import frame_table
    from lens_relevance import RelevanceError

    if level not in ("node", "edge"):
        raise RelevanceError(f"level is node or edge, not {level!r}")
    file = None if out is None else OutputFile(out, force=force, columns=("method", "order", "cmd", "cpr"))
    loaded = load_model(model, trust_remote_code, dtype=dtype, device=device)
    question = asked_question(loaded, task=task, pairs=pairs, n=n, seed=seed)
    chosen = METHODS if methods is None else [name.strip() for name in methods.split(",")]
    half = len(question.pairs) // 2
    if half == 0:
        raise RelevanceError("circuits are found on one half of the pairs and evaluated on the other, so there must be two pairs or more")
    found_on, held_out = question.pairs[slice(0, half)], question.pairs[slice(half, None)]
    table = faithfulness_table(loaded, found_on, chosen, level=level, held_out=held_out, checkpoint=checkpoint)  # type: ignore[arg-type]
    title = (
        f"Circuits of {level}s, {question.title}: found on {half} pairs (selection_cmd), CMD (0 is best) and CPR on {len(held_out)} others"
    )
    Console().print(frame_table(table.round(4), title))
    if size is not None:
        scores = score_items(Ablation(loaded, question.pairs, level), chosen[0])  # type: ignore[arg-type]
        kept, stable = frequent(scores, size, frequency).kept, scores.stability(size)
        named = scores.items.frame.assign(score=scores.signed, frequency=stable.frequency, q=stable.q_value)[kept]
        listed = named.sort_values("score", key=abs, ascending=False, kind="stable")
        words = f"{len(listed)} of the {size} strongest {level}s by {chosen[0]}, those in at least {frequency:.0%} of resamples"
        Console().print(frame_table(listed, words))
        Console().print(Text(str(stable)))
    if file is not None:
        file.write_table(table)
    if mib is not None:
        from analyses.circuits import write_mib_submission

        scored = [method for method in chosen if method != "random" and (method, level) != ("patching", "edge")]
        name = f"{'pairs' if task is None else task.replace('_', '-')}_{MIB_MODELS.get(model, Path(model).name)}"
        for path in write_mib_submission(loaded, question.pairs, mib, methods=scored, level=level, name=name):  # type: ignore[arg-type]
            Console().print(f"wrote {path}", soft_wrap=True)
