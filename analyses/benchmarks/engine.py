"""What relevance costs: `propagate` and `attach` beside a plain forward and input gradient through the same bridge.

    python -m analyses.benchmarks.engine [--layers 12 --batch 4 --positions 64 --repeats 15 --device cpu --dtype float32] [--page PAGE]

GPT-2-small shape with random weights. Every case runs once per round, the rounds interleave, and each figure is the median over rounds of
the ratio to the plain gradient of the same round, so that a machine whose speed drifts does not favour anybody.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import AutoConfig, AutoModelForCausalLM

from analyses.benchmarks.tables import markdown, write_table
from lens_relevance import logit_diff, propagate
from lens_relevance.hooks.model_state import frozen

PLAIN = "plain forward + gradient at the embeddings, all logits"


def gpt2_shape(layers: int = 12, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A bridge over a random GPT-2 of 12 heads and 768 features."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", n_layer=layers)
    model = AutoModelForCausalLM.from_config(config).eval().to(device=device, dtype=dtype)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=config, device=device, dtype=dtype)
    return bridge.eval()


def plain_gradient(model: TransformerBridge, tokens: Tensor) -> Tensor:
    """Forward, and the gradient of a logit difference at the token embeddings; parameters frozen, as in propagate."""
    kept: list[Tensor] = []

    def start(x: Tensor, hook: Any) -> Tensor:
        kept.append(x.detach().requires_grad_(True))
        return kept[0]

    with frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=[("embed.hook_out", start)]):
        logits = model(tokens, return_type="logits")
        value = (logits[:, -1, 11].float() - logits[:, -1, 22].float()).sum()
        return torch.autograd.grad(value, kept[0])[0]


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int, device: str) -> pd.DataFrame:
    """Seconds per case and round, after one warm-up round; rows are rounds.

    On a GPU these are wall-clock seconds; on a CPU processor seconds of this process, in which other users of the machine do not count.
    Python's collector of reference cycles runs between the rounds alone: at a quarter of a second with these libraries loaded, every few
    hundred thousand objects, it would fall on the same case in every round.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in cases}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds + 1):
            gc.collect()
            for name, run in cases.items():
                started = clock()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                if i:
                    times[name].append(clock() - started)
    finally:
        if was_enabled:
            gc.enable()
    return pd.DataFrame(times)


class _Saved:
    """A tensor that autograd keeps for the backward pass, counted for as long as it is kept."""

    def __init__(self, tensor: Tensor, kept: Counter[int]) -> None:
        self.tensor, self._kept, self._storage = tensor, kept, tensor.untyped_storage().data_ptr()
        kept[self._storage] += 1

    def __del__(self) -> None:
        self._kept[self._storage] -= 1
        if not self._kept[self._storage]:  # its address may be given to another tensor from here on
            del self._kept[self._storage]


def saved_mebibytes(model: TransformerBridge, run: Callable[[], Any]) -> float:
    """Size of what autograd keeps for the backward pass at once, at most, weights aside: the memory that a case adds to the model."""
    weights = {p.untyped_storage().data_ptr() for p in [*torch.nn.Module.parameters(model), *model.original_model.parameters()]}
    kept: Counter[int] = Counter()
    sizes: dict[int, int] = {}
    most = 0

    def pack(tensor: Tensor) -> _Saved:
        nonlocal most
        saved = _Saved(tensor, kept)
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        most = max(most, sum(sizes[address] for address in kept))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        run()
    return most / 2**20


def ratios(times: pd.DataFrame, base: str) -> pd.DataFrame:
    """Median over rounds of each case's ratio to `base` in the same round, and median seconds."""
    return pd.DataFrame({"ratio": times.div(times[base], axis=0).median(), "seconds": times.median()}).rename_axis("case").reset_index()


def cases(model: Any, batch: int, positions: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    device = next(torch.nn.Module.parameters(model)).device
    generator = torch.Generator().manual_seed(1)
    tokens, other = (torch.randint(0, 50000, (batch, positions), generator=generator).to(device) for _ in range(2))
    target = logit_diff(11, 22)

    def case(**options: Any) -> Callable[[], Any]:
        return lambda: propagate(model, tokens, target, **options)

    found: dict[str, Callable[[], Any]] = {PLAIN: lambda: plain_gradient(model, tokens)}
    for rules in ("gradient", "attnlrp", "cp_lrp", "relp", "gim"):
        found[f"`{rules}`, default names"] = case(rules=rules)
    found["`attnlrp`, tokens only"] = case(rules="attnlrp", names_filter="embed.hook_out")
    found["`attnlrp` with the audit"] = case(rules="attnlrp", audit=True)
    found["`deeplift`, default names"] = case(rules="deeplift", reference=other)
    found["`deeplift`, tokens only"] = case(rules="deeplift", reference=other, names_filter="embed.hook_out")
    found["`deeplift` with the audit"] = case(rules="deeplift", reference=other, audit=True)
    return found


def main(
    *,
    layers: int = 12,
    batch: int = 4,
    positions: int = 64,
    repeats: int = 15,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table of ratios, and write it into the page."""
    torch.set_num_threads(1)
    model = gpt2_shape(layers, device, getattr(torch, dtype))
    runs = cases(model, batch, positions)
    table = ratios(interleaved(runs, repeats, device), PLAIN)
    sizes = [f"{saved_mebibytes(model, run):.0f}" for run in runs.values()]
    written = markdown(
        pd.DataFrame({"case": table["case"], "time over plain": table["ratio"].map("{:.2f}".format), "tensors saved, MiB": sizes})
    )
    about = f"GPT-2-small shape with random weights, {layers} layers, {batch} x {positions} tokens, {dtype} on {device}, one thread"
    typer.echo(f"{about}, medians of {repeats} rounds\n{written}")
    if page is not None:
        shape = f"--layers {layers} --batch {batch} --positions {positions}"
        options = f"{shape} --repeats {repeats} --device {device} --dtype {dtype} --page docs/measurements/costs.md"
        clock = "time" if device == "cuda" else "processor time"
        settings = f"{about}, a logit difference at the last position, {clock}, medians of {repeats} interleaved rounds"
        write_table(page, "engine", written, command=f"analyses.benchmarks.engine {options}", settings=settings)


if __name__ == "__main__":
    typer.run(main)
