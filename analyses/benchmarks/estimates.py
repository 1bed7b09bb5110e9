"""What `lens_relevance.estimate` says beside the peak that torch's profiler sees.

    python -m analyses.benchmarks.estimates --model FOLDER [--model FOLDER2] [--positions 128] [--page docs/measurements/estimates.md]

The estimate is of tensors: the bytes that torch has allocated at the moment with most, the model left out. The profiler counts the same
from torch's allocator, event by event. `long_contexts` measures the resident set, each run in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from analyses.benchmarks.long_contexts import prompt
from analyses.models.loading import load_model
from lens_relevance import __version__, estimate, logit, mean_embedding, propagate, random_tokens

MIB = 2**20
SETTINGS: dict[str, dict[str, Any]] = {
    "attnlrp": {"rules": "attnlrp", "recompute": False},
    "attnlrp, block by block": {"rules": "attnlrp", "recompute": True},
    "attnlrp, tokens alone": {"rules": "attnlrp", "recompute": False, "names_filter": "embed.hook_out"},
    "deeplift": {"rules": "deeplift", "recompute": False, "reference": mean_embedding()},
    "deeplift, block by block": {"rules": "deeplift", "recompute": True, "reference": mean_embedding()},
    "deeplift, 4 random references": {"rules": "deeplift", "recompute": False, "reference": random_tokens(4)},
}


def allocated(run: Callable[[], Any]) -> int:
    """Bytes at the moment with most, of all that torch allocates while this runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def table(folder: str, positions: int, batch: int) -> pd.DataFrame:
    """A row per setting: MiB as estimated, and as torch allocated."""
    model, rows = load_model(folder), []
    ids = prompt(model, positions * batch).reshape(batch, positions)
    for name, settings in SETTINGS.items():
        recompute = settings["recompute"]
        asked = {key: value for key, value in settings.items() if key != "recompute"}
        found = estimate(model, positions, batch, **asked)
        expected = found.recompute_bytes if recompute else found.plain_bytes
        assert expected is not None

        def run(settings: dict[str, Any] = settings) -> Any:
            return propagate(model, ids, logit(5), **settings)

        run()  # what is computed once per model
        measured = allocated(run)
        sizes = {"estimated": expected / MIB, "allocated": measured / MIB, "off by": expected / measured - 1}
        rows.append({"model": Path(folder).name, "tokens": f"{batch} x {positions}", "run": name, **sizes})
    return pd.DataFrame(rows)


def page(rows: pd.DataFrame) -> str:
    """The table as a page of docs/measurements."""
    lines = [
        f"| {row.model} | {row.tokens} | {row.run} | {row.estimated:.1f} | {row.allocated:.1f} | {row.off:+.1%} |"
        for row in rows.rename(columns={"off by": "off"}).itertuples()
    ]
    return _PAGE.format(version=__version__, rows="\n".join(lines))


_PAGE = """# Memory: estimates and measured peaks

Version {version}, measured on 2026-11-22, float32, CPU. This page is rebuilt by

    python -m analyses.benchmarks.estimates --model FOLDER --model FOLDER2 --page docs/measurements/estimates.md

`lens_relevance.estimate` gives the largest number of bytes that tensors of the run hold at one moment, the model left out. *Allocated* is
the same as torch's profiler counts it, event by event; the estimate comes from a trial on a few tokens alone. MiB.

| model | tokens | run | estimated | allocated | off by |
|---|---|---|---|---|---|
{rows}

The resident set of a process is another number, and not what is estimated: it has besides what the C library keeps of memory that was
freed (glibc keeps pieces of up to 32 MiB, and what lies between tensors that stay), and pages of weights that are mapped from a file and
read for the first time. On [long contexts](long_contexts.md), each run in a fresh process, it is 3 to 16 % above the estimate block by
block, where freed memory is handed back after each block; at once, 26 % above at 2,048 tokens and twice as much at 512, where this is
half a gigabyte. A run on a CPU is refused where less than 1.3 times the estimate is free.
"""


def main(
    *,
    model: Annotated[list[str], typer.Option(help="Folders, or names on the hub.")],
    positions: int = 128,
    batch: int = 2,
    write_to: Annotated[Path | None, typer.Option("--page", help="A .md for the table.")] = None,
) -> None:
    """Print the table, and write the page."""
    rows = pd.concat([table(folder, positions, batch) for folder in model], ignore_index=True)
    typer.echo(rows.to_string(index=False, float_format="{:.3f}".format))
    if write_to is not None:
        write_to.write_text(page(rows))


if __name__ == "__main__":
    typer.run(main)
