"""Tokens per second of a ranking of heads over many pairs of mixed lengths, beside a plain forward and gradient over the same prompts.

    python -m analyses.benchmarks.throughput --model FOLDER [--pairs 1000 --shortest 6 --longest 30 --plain-every 5] [--page PAGE]
    accelerate launch --multi_gpu --num_processes 2 -m analyses.benchmarks.throughput --model FOLDER --plain-every 0

Pairs are pieces of one text, padded on the right; the two of a pair differ in one token, and the answer is the token that follows. Tokens
are real ones, of the clean prompts. The plain run goes through every `plain_every`-th pair in the same order, padded as they are, in
batches of `batch`, and computes logits at all positions, as `model(tokens)` does. Each of several processes takes its share, and gives its
processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console

from analyses.benchmarks.real_model import TEXT, plain_gradient
from analyses.benchmarks.tables import markdown, write_table
from analyses.datasets.processes import processes
from analyses.evaluation.ranking import rank_heads
from analyses.models.loading import load_model
from analyses.tasks import PromptPairs
from lens_relevance import logit_diff

PLAIN = "plain forward and gradient, all logits, no counterparts"


def mixed_pairs(model: Any, n: int, *, shortest: int, longest: int, seed: int = 0) -> PromptPairs:
    """Pairs of `shortest` to `longest` tokens, drawn with equal probability."""
    generator = torch.Generator().manual_seed(seed)
    first, *ids = model.to_tokens(TEXT)[0].tolist()
    lengths = torch.randint(shortest, longest + 1, (n,), generator=generator)
    starts = torch.randint(0, len(ids) - longest, (n,), generator=generator)
    clean, mask = torch.zeros(n, longest, dtype=torch.long), (torch.arange(longest) < lengths[:, None]).long()
    answers = []
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        clean[row, :length] = torch.tensor([first, *ids[start : start + length - 1]])
        answers.append(ids[start + length - 1])
    corrupt, at = clean.clone(), lengths // 2
    corrupt[torch.arange(n), at] = clean[torch.arange(n).roll(1), 1]
    return PromptPairs(clean, corrupt, logit_diff(torch.tensor(answers), torch.tensor(ids[:1] * n)), mask, mask)


def main(
    *,
    model: Annotated[str, typer.Option(help="A name on the hub or a folder.")],
    pairs: int = 1000,
    shortest: int = 6,
    longest: int = 30,
    batch: int = 32,
    methods: str = "deeplift,combined",
    plain_every: Annotated[int, typer.Option(help="Of how many pairs one goes through the plain run, too; 0: it is left out.")] = 5,
    checkpoint: Annotated[Path | None, typer.Option(help="A folder for what is done so far of the ranking (of a single method).")] = None,
    tables: Annotated[Path | None, typer.Option(help="A folder for the rankings, as CSV with all digits.")] = None,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print tokens per second, and write them into the page."""
    rows = []
    mine = processes()
    loaded = load_model(model)
    given = mixed_pairs(loaded, pairs, shortest=shortest, longest=longest)
    Console().print(f"{model}: {pairs} pairs, {shortest} to {longest} tokens in a prompt, process {mine.index + 1} of {mine.count}")

    def timed(name: str, run: Callable[[], Any], some: PromptPairs) -> Any:
        processor, clock = time.process_time(), time.perf_counter()
        result = run()
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        tokens = int(some.clean_mask.sum())
        row = {"run": name, "pairs": len(some), "tokens": f"{tokens:,}", "processor time, s": f"{processor:.0f}"}
        rows.append(row | {"tokens per second of it": f"{tokens / processor:.0f}", "by the clock, s": f"{clock:.0f}"})
        Console().print(rows[-1])
        return result

    if plain_every:
        some = given[::plain_every]
        timed(PLAIN, lambda: [plain_gradient(loaded, part.clean) for part in some.batches(batch)], some)
    for method in methods.split(","):
        share = mine.share(given.by_length())[0]
        ranking = timed(f"`rank_heads` under `{method}`", partial(rank_heads, loaded, given, method, checkpoint=checkpoint), share)
        if tables is not None and mine.index == 0:
            ranking.to_csv(tables / f"{method}.csv", index=False, float_format="%.17g")
    if page is not None and mine.index == 0:
        of = f"{Path(model).name}, pairs of {shortest} to {longest} tokens"
        options = (
            f"--pairs {pairs} --shortest {shortest} --longest {longest} --batch {batch} --methods {methods} --plain-every {plain_every}"
        )
        command = f"analyses.benchmarks.throughput --model {Path(model).name} {options} --page docs/measurements/costs.md"
        settings = f"{of}, tokens of the clean prompts, once each; {mine.count} process(es), the figures of one"
        write_table(page, f"throughput, {Path(model).name}", markdown(pd.DataFrame(rows)), command=command, settings=settings)


if __name__ == "__main__":
    typer.run(main)
