"""Features of a real model: agreement with ablating single ones, circuits, completeness, cost and memory.

    python -m analyses.benchmarks.features --model FOLDER --dictionaries FOLDER [--layers 8,11,14] [--pairs 8] [--page PAGE]

The dictionaries are TopK autoencoders of the residual stream (1,024 features, 32 on at a token), trained on the descriptions of the
installed packages and on prompts of the task ioi where the folder does not hold them yet. Cost and memory are those of transcoders with
random weights, one of 4,096 features in each layer.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.contexts import descriptions
from analyses.benchmarks.tables import markdown, write_table
from analyses.circuits.faithfulness import faithfulness_frame
from analyses.dictionaries import FeatureAblation, compare_features, save_dictionary, train_dictionary
from analyses.dictionaries.activations import token_rows
from analyses.dictionaries.comparison import METHODS
from analyses.models.loading import load_model
from analyses.models.structure import n_layers
from analyses.tasks import PromptPairs, ioi
from lens_relevance import Dictionary, propagate, read_dictionary
from lens_relevance.dictionaries import TopK
from lens_relevance.hooks.model_state import frozen

_N, _K, _CONTEXT, _ROWS = 1024, 32, 57, 800
_COST_N = 4096
_SIZES = (5, 10, 20, 50, 100, 200, 400)
_REPEATS = 3


def dictionaries_in(model: TransformerBridge, folder: Path, layers: list[int]) -> list[Dictionary]:
    """Autoencoders of the streams that leave these layers, trained where they are not there yet."""
    for layer in layers:
        if not (folder / f"layer_{layer}").exists():
            trained = train_dictionary(model, _text(model), f"blocks.{layer}.hook_resid_post", n_features=_N, k=_K, epochs=8)
            Console().print(f"layer {layer}: {trained.quality}")
            save_dictionary(trained.dictionary, folder / f"layer_{layer}")
    return [read_dictionary(folder / f"layer_{layer}") for layer in layers]


def _text(model: TransformerBridge) -> Tensor:
    """Rows of prose and of prompts, in equal numbers."""
    prose = token_rows(model, "\n".join(descriptions()), _CONTEXT)[: _ROWS // 2]
    pairs = ioi(model, _ROWS * 2, seed=5)
    prompts = torch.cat([pairs.clean, pairs.corrupt]).cpu()
    start = prose[:, :1]
    words = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))][:, 1:].flatten()
    n = min(len(prose), len(words) // (_CONTEXT - 1))
    joined = words[: n * (_CONTEXT - 1)].reshape(n, -1)
    return torch.cat([prose, torch.cat([start[:1].expand(n, 1), joined], 1)])


def completeness(model: TransformerBridge, pairs: PromptPairs, dictionaries: list[Dictionary]) -> tuple[float, float]:
    """Largest unexplained share of any layer's account; how far tokens and errors are from the target's difference, as a share of it."""
    cache = propagate(model, pairs.clean, pairs.target, reference=pairs.corrupt, dictionaries=dictionaries, audit=True)
    account = cache.conservation()
    assert cache.reference_value is not None
    whole = cache.value - cache.reference_value
    total = cache.tokens().sum(1) + torch.stack([cache.error(one.point_out[0]).sum(1) for one in dictionaries]).sum(0)
    return float((account["unexplained"] / account["value"]).abs().max()), float(((total - whole) / whole).abs().max())


def circuits(model: TransformerBridge, pairs: PromptPairs, dictionaries: list[Dictionary]) -> tuple[pd.DataFrame, FeatureAblation]:
    """Faithfulness of the k best features by each method, and what they were tried on."""
    ablation = FeatureAblation(model, pairs, dictionaries)
    counts = np.array([k for k in _SIZES if k < len(ablation.items)])
    rows = []
    for method in (*METHODS, "random"):
        frame = faithfulness_frame(ablation, ablation.scores(method), "absolute", counts=counts)
        rows.append({"method": method, **dict(zip(counts.tolist(), frame["faithfulness"], strict=True))})
    return pd.DataFrame(rows), ablation


def random_transcoders(model: TransformerBridge) -> list[Dictionary]:
    """One for each layer."""
    generator, d = torch.Generator().manual_seed(0), model.cfg.d_model

    def weight() -> Tensor:
        return torch.randn(_COST_N, d, generator=generator) * d**-0.5

    zeros, bias = torch.zeros(_COST_N), torch.zeros(d)
    return [
        Dictionary(weight(), zeros, (weight(),), bias, TopK(_K), f"blocks.{i}.ln2.hook_out", (f"blocks.{i}.hook_mlp_out",))
        for i in range(n_layers(model))
    ]


def costs(model: TransformerBridge, pairs: PromptPairs, dictionaries: list[Dictionary]) -> pd.DataFrame:
    """Processor time as a multiple of that of a plain forward and gradient at the embeddings (the least of several runs)."""
    plain = _seconds(lambda: _plain_gradient(model, pairs))
    rows = []
    for rules, reference in (("gradient", None), ("attnlrp", None), ("deeplift", pairs.corrupt)):
        row: dict[str, Any] = {"ruleset": rules}
        for path in ("without", "features", "model"):
            given: Any = {} if path == "without" else {"dictionaries": dictionaries, "dictionary_path": path}
            given |= {"rules": rules, "reference": reference}
            row[path] = _seconds(partial(propagate, model, pairs.clean, pairs.target, **given)) / plain
        rows.append(row)
    return pd.DataFrame(rows)


def _plain_gradient(model: TransformerBridge, pairs: PromptPairs) -> None:
    """What every gradient needs at least: frozen parameters, and the logits of the last position alone."""

    def leaf(x: Tensor, hook: object) -> Tensor:
        return x.detach().requires_grad_()

    with frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=[("embed.hook_out", leaf)]):
        logits = model(pairs.clean, logits_to_keep=1)
        (logits[:, -1, 0] - logits[:, -1, 1]).sum().backward()


def _seconds(run: Callable[[], object]) -> float:
    taken = []
    for _ in range(_REPEATS):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


class DenseFeatures(TorchDispatchMode):
    """Counts tensors of the size [token, feature] that are there at one time.

    most: The largest number, and `bytes` their size together.
    """

    def __init__(self, n_tokens: int, n_features: int) -> None:
        super().__init__()
        self.numel, self.n_features, self.alive, self.most, self.bytes = n_tokens * n_features, n_features, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() == self.numel and tensor.shape[-1] == self.n_features:
                self.alive += 1
                if self.alive > self.most:
                    self.most, self.bytes = self.alive, self.alive * tensor.numel() * tensor.element_size()
                weakref.finalize(tensor, self._gone)
        return out

    def _gone(self) -> None:
        self.alive -= 1


def dense_features(model: TransformerBridge, pairs: PromptPairs, dictionaries: list[Dictionary]) -> tuple[int, int]:
    """How many dense tensors over all features are there at one time in a pass, and how many are left after it."""
    with DenseFeatures(pairs.clean.numel(), _COST_N) as dense:
        cache = propagate(model, pairs.clean, pairs.target, reference=pairs.corrupt, dictionaries=dictionaries)
    gc.collect()
    assert cache.dictionaries
    return dense.most, dense.alive


def agreement(table: pd.DataFrame, layers: list[int]) -> pd.DataFrame:
    """A row for each method: Pearson of each layer and of all, Spearman of all, with intervals over pairs."""
    rows = []
    for method, here in table.groupby("method", sort=False):
        by_point = here.set_index("point")
        points = {f"layer {layer}": f"blocks.{layer}.hook_resid_post" for layer in layers} | {"all": "all"}
        cells = {f"Pearson, {name}": _interval(by_point.loc[point], "pearson") for name, point in points.items()}
        magnitude = {f"errors over effects, {name}": "{:.2f}".format(by_point["magnitude_error"][point]) for name, point in points.items()}
        rows.append({"method": f"`{method}`", **cells, "Spearman, all": _interval(by_point.loc["all"], "spearman"), **magnitude})
    return pd.DataFrame(rows)


def _interval(row: Any, name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_low']:.2f} to {row[f'{name}_high']:.2f})"


def memory(model: TransformerBridge, pairs: PromptPairs) -> pd.DataFrame:
    """Rows for a transcoder in one layer and in each: dense tensors in a pass, and after it."""
    every = random_transcoders(model)
    rows = []
    for name, given in (("one layer", every[:1]), ("each layer", every)):
        most, left = dense_features(model, pairs, given)
        rows.append({"a transcoder in": name, "dense tensors at one time, at most": most, "left after the pass": left})
    return pd.DataFrame(rows)


def measured(model: TransformerBridge, given: list[Dictionary], layers: list[int], *, n_pairs: int, features: int) -> dict[str, Any]:
    """By name: a table, and what its numbers are."""
    pairs = ioi(model, n_pairs, seed=11)
    few = pairs[torch.arange(min(4, len(pairs)))]
    of = f"{len(pairs)} pairs of ioi (seed 11)"
    account, total = completeness(model, pairs, given)
    errors = {"the account of any layer": account, "the sum of tokens and errors": total}
    found = {
        "completeness": (
            pd.DataFrame([{"off by": name, "share of the target's difference, at most": f"{x:.1e}"} for name, x in errors.items()]),
            f"{of}, `deeplift`, path `features`, dictionaries of layers {layers}, float32",
        )
    }
    table = compare_features(model, pairs, given, n_features=features)
    about = f"{of}, {features} features; `integrated_gradients` takes 10 steps, `relp` and `gradient` are means of both runs"
    found["agreement"] = agreement(table, layers), f"{about}; in brackets 95 % intervals over pairs"
    curves, ablation = circuits(model, pairs, given)
    full, empty = (float(end.mean()) for end in (ablation.full, ablation.empty))
    curves["method"] = [name if name == "random" else f"`{name}`" for name in curves["method"]]
    curves.columns = pd.Index([str(column) for column in curves.columns])
    numbers = curves.columns.drop("method")
    curves[numbers] = curves[numbers].map("{:.2f}".format)
    found["circuits"] = (
        curves,
        f"{of}, {len(ablation.items):,} features; the target is {full:.2f} with all of them and {empty:.2f} with none",
    )
    found["memory"] = memory(model, few), f"{len(few)} pairs of ioi, transcoders of {_COST_N:,} features with random weights"
    ratios = costs(model, few, random_transcoders(model))
    ratios["ruleset"] = [f"`{name}`" for name in ratios["ruleset"]]
    ratios = ratios.rename(columns={"without": "without dictionaries", "features": "path `features`", "model": "path `model`"})
    ratios[ratios.columns[1:]] = ratios[ratios.columns[1:]].map("{:.2f}".format)
    found["costs"] = (
        ratios,
        f"{len(few)} pairs of ioi, a transcoder of {_COST_N:,} features in each layer (TopK, {_K}, random), processor time over that of a "
        f"plain forward and gradient with the last logits, the least of {_REPEATS} runs of each, on a busy machine",
    )
    return found


def main(
    *,
    model: Annotated[str, typer.Option(help="A hub name or a folder.")],
    dictionaries: Annotated[Path, typer.Option(help="Where the dictionaries are, or are written to.")],
    layers: Annotated[str, typer.Option(help="Their layers.")] = "8,11,14",
    n_pairs: Annotated[int, typer.Option("--pairs", help="Pairs of the task ioi.")] = 8,
    features: Annotated[int, typer.Option(help="Features that are ablated, of all layers together.")] = 210,
    page: Annotated[Path | None, typer.Option(help="The page with the tables' places.")] = None,
) -> None:
    """Print the tables of docs/measurements/features.md, and write them into the page."""
    torch.set_num_threads(1)
    loaded, name, chosen = load_model(model), Path(model).name, [int(layer) for layer in layers.split(",")]
    given = dictionaries_in(loaded, dictionaries, chosen)
    options = f"--model {name} --dictionaries FOLDER --layers {layers} --pairs {n_pairs} --features {features}"
    for place, (table, settings) in measured(loaded, given, chosen, n_pairs=n_pairs, features=features).items():
        typer.echo(f"{settings}\n{markdown(table)}\n")
        if page is not None:
            command = f"analyses.benchmarks.features {options} --page docs/measurements/features.md"
            write_table(page, f"{name}, {place}", markdown(table), command=command, settings=f"{name}, {settings}")


if __name__ == "__main__":
    typer.run(main)
