"""Activation patching beside `transformer_lens.patching`: the same numbers, and how many times sooner.

    python -m analyses.benchmarks.patching [--pairs 4 --positions 16 --layers 12 --rounds 3 --threads 1]
    python -m analyses.benchmarks.patching --model FOLDER --pairs 16 [--page PAGE]

Without a model: GPT-2-small shape with random weights. What it gains depends on the pairs: runs are not repeated before the first token in
which clean and corrupt differ, so there are two sets, one with a single other token two thirds through (as in IOI, where a name is swapped)
and one with nothing in common. With a model: all heads on pairs of the ioi task. Rounds interleave, and each figure is the median over
rounds of the ratio within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import transformer_lens.patching as tl_patching
import typer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.engine import gpt2_shape
from analyses.benchmarks.tables import markdown, write_table
from analyses.models.loading import load_model
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs, ioi
from lens_relevance import logit_diff

SWEEPS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "all heads": ("z", tl_patching.get_act_patch_attn_head_out_all_pos),
    "residual stream by position": ("resid_pre", tl_patching.get_act_patch_resid_pre),
}


def make_pairs(n: int, positions: int, one_token: bool) -> PromptPairs:
    """Random pairs that differ in one token, or in all."""
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = (torch.randint(0, 50000, (n, positions), generator=generator) for _ in range(2))
    if one_token:
        at = positions * 2 // 3
        corrupt = torch.cat([clean[:, :at], corrupt[:, at : at + 1], clean[:, at + 1 :]], dim=1)
    return PromptPairs(clean, corrupt, logit_diff(11, 22))


def by_transformer_lens(model: TransformerBridge, pairs: PromptPairs, component: str, *, sweep: Callable[..., Tensor]) -> Tensor:
    """[layer, head] or [layer, pos]: the patched metric, averaged over pairs."""
    metric = pairs.metric(model)
    hook = {"z": "attn.hook_z", "resid_pre": "hook_resid_pre"}[component]
    with torch.no_grad():
        _, clean = model.run_with_cache(
            pairs.clean, names_filter=lambda name: name.endswith(hook) or name.endswith("hook_in"), use_cache=False
        )
        return sweep(model, pairs.corrupt, clean, lambda logits: metric(logits).mean())


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What a run gives, and the processor seconds it took, in which other users of the machine do not count."""
    started = time.process_time()
    result = run()
    return result, time.process_time() - started


def measure(model: TransformerBridge, pairs: PromptPairs, name: str, *, rounds: int) -> dict[str, Any]:
    """Processor seconds of both and the ratio, medians over rounds, with the largest difference of their numbers."""
    component, sweep = SWEEPS[name]
    times, differences = [], []
    for _ in range(rounds):
        theirs, their_time = timed(lambda: by_transformer_lens(model, pairs, component, sweep=sweep))
        ours, our_time = timed(lambda: torch.tensor(activation_patching(model, pairs, component).grid(component, "patched").to_numpy()))
        times.append({"transformer_lens (s)": their_time, "ours (s)": our_time, "times faster": their_time / our_time})
        differences.append((theirs - ours).abs().max())
    return {
        "sweep": name,
        **{str(key): value for key, value in pd.DataFrame(times).median().items()},
        "largest difference": float(torch.stack(differences).max()),
    }


def main(
    *,
    model: Annotated[str | None, typer.Option(help="A name on the hub or a folder; GPT-2-small shape if left out.")] = None,
    pairs: int = 4,
    positions: int = 16,
    layers: int = 12,
    rounds: int = 3,
    threads: int = 1,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table, and write it into the page."""
    torch.set_num_threads(threads)
    tl_patching.tqdm = lambda items: items  # its bars would drown the table
    rows = []
    if model is None:
        loaded, sweeps = gpt2_shape(layers), list(SWEEPS)
        sets = {"in one token": make_pairs(pairs, positions, True), "in all tokens": make_pairs(pairs, positions, False)}
    else:
        loaded, sweeps = load_model(model), ["all heads"]
        sets = {"in a name": ioi(loaded, n=pairs)}
    for differ, made in sets.items():
        activation_patching(loaded, made, "z")  # warm up
        rows += [{"pairs differ": differ, **measure(loaded, made, name, rounds=rounds)} for name in sweeps]
    name = "GPT-2-small shape" if model is None else Path(model).name
    table, formats = pd.DataFrame(rows), {"transformer_lens (s)": "{:.1f}", "ours (s)": "{:.1f}", "times faster": "{:.1f}"}
    for column, form in (formats | {"largest difference": "{:.1e}"}).items():
        table[column] = table[column].map(form.format)
    about = f"{name}, {len(loaded.blocks)} layers, {pairs} pairs of {made.clean.shape[1]} tokens, {threads} thread(s), processor time"
    typer.echo(f"{about}, {rounds} round(s)\n{markdown(table)}")
    if page is not None:
        given = f"--layers {layers} --positions {positions}" if model is None else f"--model {name}"
        options = f"{given} --pairs {pairs} --rounds {rounds} --threads {threads} --page docs/measurements/costs.md"
        settings = f"{about}, medians of {rounds} interleaved round(s)"
        write_table(page, f"patching, {name}", markdown(table), command=f"analyses.benchmarks.patching {options}", settings=settings)


if __name__ == "__main__":
    typer.run(main)
