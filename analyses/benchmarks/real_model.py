"""What relevance costs on a real language model, where most of a plain run goes into logits that nobody reads.

    python -m analyses.benchmarks.real_model --model FOLDER [--batch 4 --positions 32 --repeats 7] [--page PAGE]

Every case runs once per round, the rounds interleave, and each figure is the median over rounds of the ratio of processor times to a plain
forward and input gradient of the same round: once with all logits, as a plain run has them, and once with those of the last position alone
(`logits_to_keep=1`). The target is a logit difference at the last position, as data and as a function.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from jaxtyping import Int
from torch import Tensor

from analyses.benchmarks.engine import gpt2_shape, interleaved
from analyses.benchmarks.tables import markdown, write_table
from analyses.models.loading import load_model
from lens_relevance import logit_diff, propagate
from lens_relevance.hooks.model_state import frozen

TEXT = """The house stood at the end of a narrow road, behind two old trees that nobody had planted. In the morning the kitchen was full of
light, and one could see the river from the window above the sink. Anna made coffee, cut the bread and put the letters on the table. Her
brother came down late, as he always did, and read the newspaper before he said a word. Later they walked to the station, where the train to
the coast was already waiting. It was the first warm day of the year, and most people had left their coats at home. On the way back they
bought apples, a map of the town and a small blue lamp for the room under the roof, which had been dark since the winter. In the evening
the neighbours came over, sat in the garden and talked about the harvest, the new bridge and the price of wood until it was too cold."""

PLAIN, SPARED = "plain, all logits", "plain, last logits"


def plain_gradient(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Forward, and the gradient of a logit difference at the token embeddings; parameters frozen, as in propagate."""
    kept: list[Tensor] = []

    def start(x: Tensor, hook: Any) -> Tensor:
        kept.append(x.detach().requires_grad_(True))
        return kept[0]

    with frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=[("embed.hook_out", start)]):
        logits = model(tokens, return_type="logits", **options)
        return torch.autograd.grad((logits[:, -1, 11] - logits[:, -1, 22]).sum(), kept[0])[0]


def prompts(model: Any, batch: int, positions: int) -> list[Int[Tensor, "batch pos"]]:
    """Token ids of as many prompts and counterparts: pieces of one text, or any ids where the model has no tokenizer."""
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(0, int(model.cfg.d_vocab), (batch, positions), generator=generator) for _ in range(2)]
    first, *ids = model.to_tokens(TEXT)[0].tolist()
    ids = ids * (1 + 2 * batch * positions // len(ids))
    rows = [[first, *ids[7 * i : 7 * i + positions - 1]] for i in range(2 * batch)]
    return list(torch.tensor(rows).chunk(2))


def cases(model: Any, batch: int, positions: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    tokens, other = prompts(model, batch, positions)
    target = logit_diff(11, 22)

    def function(logits: Tensor) -> Tensor:
        return logits[:, -1, 11] - logits[:, -1, 22]

    def case(target: Any, **options: Any) -> Callable[[], Any]:
        return lambda: propagate(model, tokens, target, **options)

    return {
        PLAIN: lambda: plain_gradient(model, tokens),
        SPARED: lambda: plain_gradient(model, tokens, logits_to_keep=1),
        "`attnlrp`": case(target, rules="attnlrp"),
        "`attnlrp`, the target as a function": case(function, rules="attnlrp"),
        "`deeplift`": case(target, rules="deeplift", reference=other),
        "`deeplift`, the target as a function": case(function, rules="deeplift", reference=other),
        "`attnlrp`, all logits asked for": case(target, rules="attnlrp", names_filter=["embed.hook_out", "unembed.hook_out"]),
    }


def table(model: Any, batch: int, positions: int, *, repeats: int) -> pd.DataFrame:
    """A row per case: its ratio to each of the two plain runs, and seconds of processor time."""
    times = interleaved(cases(model, batch, positions), repeats, "cpu")
    columns = {f"of {plain}": times.div(times[plain], axis=0).median() for plain in (PLAIN, SPARED)}
    return pd.DataFrame({**columns, "seconds": times.median()}).rename_axis("case").reset_index()


def main(
    *,
    model: Annotated[
        str | None, typer.Option(help="A name on the hub or a folder; GPT-2-small shape with random weights if left out.")
    ] = None,
    batch: int = 4,
    positions: int = 32,
    repeats: int = 7,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table of ratios, and write it into the page."""
    torch.set_num_threads(1)
    loaded, name = gpt2_shape() if model is None else load_model(model), "GPT-2-small shape" if model is None else Path(model).name
    found = table(loaded, batch, positions, repeats=repeats)
    numbers = found.columns.drop("case")
    found[numbers] = found[numbers].map("{:.2f}".format)
    written = markdown(found)
    about = f"{name}, {batch} x {positions} tokens, a logit difference at the last position, float32 on cpu, one thread, processor time"
    typer.echo(f"{about}\n{written}")
    if page is not None:
        given = "" if model is None else f"--model {name} "
        options = f"{given}--batch {batch} --positions {positions} --repeats {repeats} --page docs/measurements/costs.md"
        settings = f"{about}, medians of {repeats} interleaved rounds"
        write_table(page, f"real model, {name}", written, command=f"analyses.benchmarks.real_model {options}", settings=settings)


if __name__ == "__main__":
    typer.run(main)
