"""What relevance costs on each family: `propagate` beside a plain forward and input gradient through the same model.

    python -m analyses.benchmarks.costs [--family Mixtral] [--repeats 9] [--batch 4 --positions 64] [--page PAGE]

Random weights, 4 layers of width 256, float32. Every case runs once per round, the rounds interleave, and a figure is the median over
rounds of the ratio to the plain gradient of the same round, in processor time. A mixture of experts is recomputed under the rules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from analyses.benchmarks.engine import interleaved, ratios
from analyses.benchmarks.tables import markdown, write_table
from analyses.benchmarks.tiny_models import FAMILIES, Family
from analyses.datasets.progress import watched
from lens_relevance import RelevanceError, logit_diff, propagate
from lens_relevance.coverage_table import random_inputs
from lens_relevance.hooks.model_state import frozen
from lens_relevance.inputs.prompt import Inputs, read_inputs
from lens_relevance.sites import anatomy

# What a setting of a tiny family becomes; the rest stays.
_LARGER: dict[str, int] = (
    dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 256)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_mlp", "encoder_ffn_dim", "decoder_ffn_dim"), 768)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 4)
    | dict.fromkeys(("vocab_size", "d_vocab"), 2000)
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 256)
    | dict.fromkeys(("head_dim", "d_head", "d_kv", "q_lora_rank", "kv_lora_rank", "v_head_dim", "query_pre_attn_scalar"), 64)
    | dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 32)
    | dict(moe_intermediate_size=384, sliding_window=32, image_size=64, patch_size=8)
    | dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 8)
)

_SINGLE = ("attnlrp", "cp_lrp", "relp", "gim")


def larger(family: Family) -> Family:
    """The family at the sizes of this table."""

    def grown(settings: dict[str, Any]) -> dict[str, Any]:
        return {key: grown(value) if isinstance(value, dict) else _LARGER.get(key, value) for key, value in settings.items()}

    return replace(family, settings=grown(family.settings))


def plain_gradient(model: TransformerBridge, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward, and the gradient of a logit difference at the embeddings; parameters frozen, as in propagate."""
    kept: list[Tensor] = []

    def start(x: Tensor, hook: Any) -> Tensor:
        kept.append(x.detach().requires_grad_(True))
        return kept[-1]

    with frozen(model), torch.enable_grad(), model.hooks(fwd_hooks=[(name, start) for name in anatomy(model).leaves]):
        logits = read_inputs(model, inputs).call(model)
        last = logits if logits.ndim == 2 else logits[:, -1]
        return torch.autograd.grad((last[:, 0] - last[:, 1]).sum(), kept, allow_unused=True)


def cost(family: Family, repeats: int = 9, batch: int = 4, *, positions: int = 64) -> dict[str, float]:
    """Ratios to the plain gradient by ruleset, and the seconds of the plain gradient."""
    model = larger(family).build(torch.float32)
    generator = torch.Generator().manual_seed(1)
    one, other = (random_inputs(model, batch, positions, generator=generator) for _ in range(2))
    target = logit_diff(0, 1)
    cases: dict[str, Callable[[], Any]] = {"plain": lambda: plain_gradient(model, one)}
    for rules in _SINGLE:
        cases[rules] = lambda rules=rules: propagate(model, one, target, rules=rules)  # type: ignore[misc]
    cases["deeplift"] = lambda: propagate(model, one, target, rules="deeplift", reference=other)
    table = ratios(interleaved(cases, repeats, "cpu"), "plain").set_index("case")
    measured = {str(name): float(ratio) for name, ratio in table["ratio"].drop("plain").items()}
    return measured | {"plain, s": float(table["seconds"]["plain"])}


def costs(names: list[str], repeats: int = 9, batch: int = 4, *, positions: int = 64) -> pd.DataFrame:
    """One row per family that has no part without a rule; raises RelevanceError for an unknown family."""
    rows = []
    for name in track(names, "families", disable=not watched(), transient=True, console=Console(stderr=True)):
        if name not in FAMILIES:
            raise RelevanceError(f"unknown family {name!r}; there are {', '.join(FAMILIES)}")
        if not anatomy(FAMILIES[name].build(torch.float32)).uncovered:
            rows.append({"family": FAMILIES[name].title, **cost(FAMILIES[name], repeats, batch, positions=positions)})
    return pd.DataFrame(rows, columns=["family", *_SINGLE, "deeplift", "plain, s"])


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as one reads it."""
    ratios_of, seconds = list(table.columns[1:-1]), table.columns[-1]
    text = table.assign(**{name: table[name].map("{:.2f}".format) for name in ratios_of}, **{seconds: table[seconds].map("{:.3f}".format)})
    return text.rename(columns={name: f"`{name}`" for name in ratios_of})


def main(
    *,
    family: Annotated[list[str] | None, typer.Option(help="A family by name, several times if wanted; all if left out.")] = None,
    repeats: int = 9,
    batch: int = 4,
    positions: int = 64,
    page: Annotated[Path | None, typer.Option(help="The page with the table's place.")] = None,
) -> None:
    """Print the table as Markdown, and write it into the page."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    written = markdown(shown(costs(family or list(FAMILIES), repeats, batch, positions=positions)))
    typer.echo(written)
    if page is not None:
        chosen = "".join(f" --family {name}" for name in family or ())
        options = f"--repeats {repeats} --batch {batch} --positions {positions}{chosen} --page docs/measurements/costs.md"
        settings = (
            f"Random weights, 4 layers of width 256, {batch} x {positions} tokens, float32, one thread; processor time over plain forward "
            f"and gradient, medians of {repeats} interleaved rounds; `deeplift` runs the reference as well"
        )
        write_table(page, "families", written, command=f"analyses.benchmarks.costs {options}", settings=settings)


if __name__ == "__main__":
    typer.run(main)
