"""What an atlas costs beside a plain forward and gradient over the same batches.

    python -m analyses.benchmarks.atlas --model FOLDER --layers 9 --tokens 3000 [--page docs/measurements/contexts.md]

Both read the same windows in the same batches, compute logits at the last real position alone, and take the gradient of the prediction
less its runner-up at the neurons of the same layers. Plain: nothing else, no rules, no ranking, no graph below the lowest. Each
is run once on a batch before it is timed (the atlas compares a model with its sites at the first run). Processor time, one thread.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.contexts import descriptions
from analyses.benchmarks.tables import markdown, write_table
from analyses.contexts import build_atlas
from analyses.contexts.build import batch_of, windows_per_pass
from analyses.contexts.corpus import Window, in_batches, texts_of, windows
from analyses.models.loading import load_model
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.logit_reading import logits_at
from lens_relevance.sites import anatomy


def texts_with(model: TransformerBridge, texts: Iterator[str], n_tokens: int, window: int) -> tuple[list[str], int]:
    """The first texts that have so many tokens, and how many windows these are."""
    chosen: list[str] = []
    tokens = n_windows = 0
    for text in texts:
        pieces = list(windows(model, iter([text]), window))
        chosen.append(text)
        n_windows += len(pieces)
        tokens += sum(len(piece.tokens) for piece in pieces)
        if tokens >= n_tokens:
            break
    return chosen, n_windows


@left_as_found
def plain(model: TransformerBridge, batches: Iterator[list[Window]], layers: list[int]) -> int:
    """A forward and a gradient at the neurons of some layers for each batch; how many tokens these had."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    points, n_tokens, neurons = anatomy(model).layout["neurons"], 0, list[torch.Tensor]()

    def take(x: torch.Tensor, hook: object) -> torch.Tensor:
        neurons.append(x if x.requires_grad else x.detach().requires_grad_())  # the lowest layer is where the graph begins
        return neurons[-1]

    for batch in batches:
        tokens, mask = batch_of(batch)
        neurons.clear()
        with (
            model.hooks(fwd_hooks=[(points[layer], take) for layer in layers]),
            logits_at(model, mask.sum(1, keepdim=True) - 1, tokens.shape[1]),
        ):
            best = model(tokens, attention_mask=mask)[:, -1].topk(2, -1).values
        torch.autograd.grad((best[:, 0] - best[:, 1]).sum(), neurons)
        n_tokens += int(mask.sum())
    return n_tokens


def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name, a folder or a GGUF file.")] = "embedded",
    text: Annotated[Path | None, typer.Option(help="A corpus; the descriptions of the installed packages if left out.")] = None,
    layers: Annotated[str, typer.Option(help="Whose neurons.")] = "0",
    tokens: Annotated[int, typer.Option(help="How many tokens, at least.")] = 3000,
    window: Annotated[int, typer.Option(help="Tokens in a window, BOS included.")] = 64,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print what both cost, and write it into the page."""
    torch.set_num_threads(1)
    name, loaded, chosen = Path(model).name, load_model(model), [int(layer) for layer in layers.split(",")]
    texts, n_windows = texts_with(loaded, descriptions() if text is None else texts_of(text), tokens, window)

    def batches() -> Iterator[list[Window]]:
        return in_batches(windows(loaded, iter(texts), window), windows_per_pass(window))

    build_atlas(loaded, texts, layers=chosen, window=window, limit=2)
    plain(loaded, islice(batches(), 1), chosen)
    began = time.process_time()
    n_tokens = plain(loaded, batches(), chosen)
    without = time.process_time() - began
    began = time.process_time()
    atlas = build_atlas(loaded, texts, layers=chosen, window=window)
    with_it = time.process_time() - began
    assert atlas.info["tokens"] == n_tokens
    rates = {"forward and gradient": n_tokens / without, "atlas": n_tokens / with_it}
    rows = [{"run": run, "tokens a second": f"{rate:.0f}", "share": f"{rate * without / n_tokens:.2f}"} for run, rate in rates.items()]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    of = f"{name}, neurons of layers {layers}, {n_windows} windows of up to {window} tokens, {n_tokens:,} tokens"
    Console(soft_wrap=True).print(f"{of}; largest memory of the process {memory:.2f} GiB")
    typer.echo(written := markdown(pd.DataFrame(rows)))
    if page is not None:
        options = f"--model {name} --layers {layers} --tokens {tokens} --window {window}"
        command = f"analyses.benchmarks.atlas {options} --page docs/measurements/contexts.md"
        settings = f"{of}; processor time of one thread, once each; largest memory of the process {memory:.1f} GiB"
        write_table(page, f"atlas of {name}, layers {layers}", written, command=command, settings=settings)


if __name__ == "__main__":
    typer.run(main)
