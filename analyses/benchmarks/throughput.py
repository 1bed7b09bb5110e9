"""Tokens per second of a ranking of heads over many pairs of mixed lengths, beside a plain forward and gradient over the same prompts.

    python -m analyses.benchmarks.throughput --model FOLDER [--pairs 1000 --shortest 6 --longest 30]

Pairs are pieces of one text, padded on the right; the two of a pair differ in one token, and the answer is the token that follows. Tokens
are real ones, of the clean prompts. The plain run goes through the same pairs in the same order, padded as they are, in batches of `batch`,
and computes logits at all positions, as `model(tokens)` does. Processor time; under `accelerate launch` the time on the clock is what
counts, and each process takes its share.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from analyses.benchmarks.real_model import TEXT, plain_gradient
from analyses.evaluation.ranking import rank_heads
from analyses.models.loading import load_model
from analyses.tasks import PromptPairs
from lens_relevance import logit_diff


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
) -> None:
    """Print tokens per second."""
    loaded = load_model(model)
    given = mixed_pairs(loaded, pairs, shortest=shortest, longest=longest)
    tokens = int(given.clean_mask.sum())
    Console().print(f"{model}: {pairs} pairs, {tokens:,} tokens, {shortest} to {longest} in a prompt")

    def timed(name: str, run: Any) -> None:
        processor, clock = time.process_time(), time.perf_counter()
        run()
        processor, clock = time.process_time() - processor, time.perf_counter() - clock
        Console().print(
            f"{name}: {processor:.0f} s of processor time, {tokens / processor:.0f} tokens per second of it; {clock:.0f} s on the clock"
        )

    timed("plain forward and gradient", lambda: [plain_gradient(loaded, part.clean) for part in given.batches(batch)])
    for method in methods.split(","):
        timed(f"rank_heads, {method}", lambda method=method: rank_heads(loaded, given, method))


if __name__ == "__main__":
    typer.run(main)
