"""Long contexts on a real model: peak memory over the loaded model and time, at once and block by block.

    python -m analyses.benchmarks.long_contexts --model FOLDER --results long_contexts.csv [--page docs/measurements/long_contexts.md]

Each case runs twice in a process of its own, the first time for its memory and the second for its time (a model's first call compares
the model with its sites, and the process has no pages yet). A case is a text of so many tokens (against the same text with another token
in its middle, where the ruleset compares two runs), the logit of one token at the last position, and all that `propagate` keeps by
default (embeddings, residual stream, heads, neurons). Memory is the highest resident set of the process during the run less that before
it; `estimated` is what `lens_relevance.estimate` says, of tensors alone. Cases of which the estimate is above --limit are not run, nor
are those that the file of results has already.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from analyses.benchmarks.resident import highest
from lens_relevance import __version__

GIB = 2**30
LENGTHS = (512, 1024, 2048, 4096, 8192)
WAYS = ("at once", "block by block", "block by block, in a folder")


def prompt(model: Any, positions: int) -> Int[Tensor, "1 pos"]:
    """A text: the package's own source."""
    source = "\n".join(path.read_text() for path in sorted(Path(__file__).parents[2].glob("lens_relevance/**/*.py")))
    ids: Tensor = model.to_tokens(source, truncate=False)[:, :positions]
    if ids.shape[1] < positions:
        raise ValueError(f"the package's source has {ids.shape[1]} tokens, fewer than {positions}")
    return ids


def case(folder: str, positions: int, rules: str, way: str, *, limit: float) -> dict[str, Any]:
    """One row of the table."""
    from analyses.models.loading import load_model
    from lens_relevance import estimate, logit, propagate
    from lens_relevance.ruleset_tables import needs_reference, ruleset

    warnings.filterwarnings("ignore")
    model = load_model(folder)
    inputs, recompute = prompt(model, positions), way != WAYS[0]
    reference = None
    if needs_reference(ruleset(rules)):
        reference = inputs.clone()
        reference[0, positions // 2] = inputs[0, positions // 2 - 1]
    with tempfile.TemporaryDirectory() as kept:
        device = Path(kept) if way == WAYS[2] else None
        expected = estimate(model, positions, rules=rules, reference=reference, device=device)
        estimated = ((expected.recompute_bytes if recompute else expected.plain_bytes) or 0) / GIB
        row: dict[str, Any] = {"tokens": positions, "rules": rules, "way": way, "estimated": estimated}
        if estimated > limit:
            return row
        del expected

        def run() -> None:
            started, processor = time.perf_counter(), time.process_time()
            cache = propagate(model, inputs, logit(5), rules=rules, reference=reference, recompute=recompute, device=device)
            row.update({"seconds": time.perf_counter() - started, "processor": time.process_time() - processor})
            row.update({"value": float(cache.value), "explained": float(cache.tokens().sum())})

        row["peak"] = highest(run) / GIB
        run()
    return row


def page(rows: pd.DataFrame, model: str) -> str:
    """The table as a page of docs/measurements."""
    lines = []
    for (positions, rules), group in rows.groupby(["tokens", "rules"]):
        by_way = group.set_index("way")
        cells = [_memory(by_way, way) for way in WAYS]
        seconds = by_way["processor"].reindex(WAYS)
        blocks = seconds[WAYS[1]] if pd.notna(seconds[WAYS[1]]) else seconds[WAYS[2]]
        ratio = f"{blocks / seconds[WAYS[0]]:.2f}" if pd.notna(blocks / seconds[WAYS[0]]) else "–"
        times = [f"{value:.0f}" if pd.notna(value) else "–" for value in (seconds[WAYS[0]], blocks)]
        lines.append(f"| {positions:,} | `{rules}` | {' | '.join([*cells, *times, ratio])} |")
    return _PAGE.format(model=model, version=__version__, date=date.today(), table="\n".join(lines))


def _memory(by_way: pd.DataFrame, way: str) -> str:
    if way not in by_way.index:
        return "–"
    row = by_way.loc[way]
    measured = f"{row['peak']:.2f}" if pd.notna(row["peak"]) else "not run"
    return f"{measured} ({row['estimated']:.2f})"


_PAGE = """# Long contexts

Measured with version {version} on {date} on {model}, float32, one thread of a busy machine without a GPU. This page is rebuilt by

    python -m analyses.benchmarks.long_contexts --model FOLDER --results long_contexts.csv --page docs/measurements/long_contexts.md

Peak memory beside the loaded model (GiB), with what `lens_relevance.estimate` says in brackets, and processor seconds of a second run. One
prompt; the target is a logit at the last position; kept is what `propagate` keeps by default (embeddings, residual stream, heads, neurons
of all layers). `deeplift` compares with the same text with another token in its middle. "not run": estimated alone. A dash: left
out.

| tokens | ruleset | at once | block by block | the same, in a folder | seconds at once | seconds block by block | ratio |
|---|---|---|---|---|---|---|---|
{table}

The estimate counts tensors. The resident set has besides what the C library holds back of freed memory (glibc: with
`MALLOC_MMAP_THRESHOLD_=131072` in the environment, it is within 3 % of the estimate at 1,024 tokens). What is kept is a large part of the
memory of a run block by block: what is more than 512 MiB goes to temporary files by itself, all of it to a folder (`device=Path(...)`)
if one is given; with fewer names (`names_filter="embed.hook_out"`) the rest remains.
"""


def main(
    *,
    model: Annotated[str, typer.Option(help="A folder, or a name on the hub.")],
    results: Annotated[Path, typer.Option(help="A .csv for the rows; those that are there are not run again.")],
    write_to: Annotated[Path | None, typer.Option("--page", help="A .md for the table.")] = None,
    lengths: Annotated[str, typer.Option(help="Tokens of each case.")] = ",".join(map(str, LENGTHS)),
    rules: Annotated[str, typer.Option(help="Rulesets.")] = "attnlrp,deeplift",
    ways: Annotated[str, typer.Option(help="Indices of the ways: 0 at once, 1 block by block, 2 the same in a folder.")] = "0,1,2",
    limit: Annotated[float, typer.Option(help="GiB over the loaded model that a case may be estimated at.")] = 8.0,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the cases that are missing, one after the other, and write the table."""
    if one is not None:
        positions, ruleset, way = json.loads(one)
        print(json.dumps(case(model, positions, ruleset, way, limit=limit)))
        return
    console = Console()
    for positions in map(int, lengths.split(",")):
        for ruleset in rules.split(","):
            for way in (WAYS[int(index)] for index in ways.split(",")):
                rows = pd.read_csv(results) if results.exists() else pd.DataFrame(columns=["tokens", "rules", "way"])
                if ((rows["tokens"] == positions) & (rows["rules"] == ruleset) & (rows["way"] == way)).any():
                    continue
                asked = ["--model", model, "--results", str(results), "--limit", str(limit), "--one", json.dumps([positions, ruleset, way])]
                run = subprocess.run([sys.executable, "-m", __spec__.name, *asked], capture_output=True, text=True)
                if run.returncode:
                    raise RuntimeError(run.stderr[-2000:])
                row = json.loads(run.stdout.strip().splitlines()[-1])
                console.print(row)
                pd.concat([rows, pd.DataFrame([row])], ignore_index=True).to_csv(results, index=False)
    if write_to is not None:
        write_to.write_text(page(pd.read_csv(results), Path(model).name))


if __name__ == "__main__":
    typer.run(main)
