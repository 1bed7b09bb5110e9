"""Which rulesets work on which family of models, with the conservation error of each: the table of docs/measurements/families.md.

    python -m analyses.benchmarks.families [--family gpt2 --family t5] [--more] [--released] [--dtype float64] [--seed 0]

Every family is a tiny model with random weights (see tiny_models.py). A cell is what `coverage` finds: the
largest share of the target, at any layer, that the conservation account leaves open, rounded up to a power of ten. A family of which a part
has no rule is refused as a whole by `propagate`, with the reason that the table gives.

Errors of 1e-13 and less are rounding in float64. Those of 1e-8 to 1e-5 are rounding in float32: Hugging Face computes
RMSNorm and some softmaxes in it whatever the dtype of the model. A dash without a reason: the ruleset is for models with norms on queries
and keys (`attnlrp_plain_qk`), or with the linear layers of an MLP (`cp_lrp_gamma`), and this one has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformer_lens.model_bridge import TransformerBridge
from transformers.utils import logging

from analyses.benchmarks.released import RELEASED, Released, build_released
from analyses.benchmarks.tiny_models import FAMILIES, MORE
from analyses.datasets.progress import watched
from lens_relevance import RelevanceError, coverage, rulesets
from lens_relevance.sites import anatomy


def families(names: Sequence[str] = tuple(FAMILIES), dtype: torch.dtype = torch.float64, seed: int = 0) -> pd.DataFrame:
    """One row per family: family, a column per ruleset with its conservation error, and reason.

    The error is NaN where a ruleset does not work, for the given reason, or does not apply to the family.

    Raises:
        RelevanceError: an unknown family.
    """
    known, rows = FAMILIES | MORE, []
    for name in track(list(names), "families", disable=not watched(), transient=True, console=Console(stderr=True)):
        if name not in known:
            raise RelevanceError(f"unknown family {name!r}; there are {', '.join(known)}")
        rows.append({"family": known[name].title, **_cells(known[name].build(dtype, seed))})
    return pd.DataFrame(rows, columns=["family", *rulesets(), "reason"])


def released(settings: Sequence[Released] = tuple(RELEASED), dtype: torch.dtype = torch.float32, *, seed: int = 0) -> pd.DataFrame:
    """As `families`, with one row per released setting; float64 is beyond some of Hugging Face's forwards."""
    rows = []
    for each in track(settings, "released settings", disable=not watched(), transient=True, console=Console(stderr=True)):
        title = f"{(FAMILIES | MORE)[each.family].title}: {each.models}"
        try:
            model = build_released(each, dtype, seed)
        except (ArithmeticError, AssertionError, RuntimeError) as error:  # TransformerLens refuses it, or cannot wrap it
            rows.append({"family": title, "reason": f"no bridge can be built: {type(error).__name__} {str(error).split('. ')[0]}".strip()})
            continue
        rows.append({"family": title, **_cells(model)})
    return pd.DataFrame(rows, columns=["family", *rulesets(), "reason"])


def _cells(model: TransformerBridge) -> dict[str, Any]:
    """What `coverage` finds on a model, or why it is refused."""
    if uncovered := anatomy(model).uncovered:  # refused by `propagate`, whatever the ruleset
        return {"reason": _reasons(uncovered)}
    table = coverage(model).rulesets
    errors = {str(row.ruleset): float(row.unexplained) if row.works else float("nan") for row in table.itertuples()}  # type: ignore[arg-type]
    failed = {str(row.ruleset): str(row.reason) for row in table.itertuples() if row.applies and not row.works}
    return errors | {"reason": _reasons(failed)}


def _reasons(by_part: dict[str, str]) -> str:
    """Why parts have no rule, each reason once, without the number of the layer."""
    return "; ".join(dict.fromkeys(reason.removeprefix(f"{part}: ") for part, reason in by_part.items()))


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown: families that work first, then those that are refused, by name and with the reason."""
    names = [column for column in table.columns if column not in ("family", "reason")]
    lines = ["| family | " + " | ".join(f"`{name}`" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    refused = table[names].isna().all(axis=1)
    for row in table[~refused].to_dict("records"):
        lines.append(f"| {row['family']} | " + " | ".join(power_of_ten(row[name]) for name in names) + " |")
    lines += [f"\n{row['family']}: {_in_a_cell(row['reason'])}" for row in table[~refused].to_dict("records") if row["reason"]]
    if refused.any():
        lines += ["", "| refused | reason |", "|---|---|"]
        lines += [f"| {row['family']} | {_in_a_cell(row['reason'])} |" for row in table[refused].to_dict("records")]
    return "\n".join(lines)


def power_of_ten(error: float) -> str:
    """An error rounded up to a power of ten; a dash where there is none."""
    if math.isnan(error):
        return "–"
    return f"1e{max(-16, math.ceil(math.log10(error)))}" if error > 0 else "1e-16"


def _in_a_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main(
    *,
    family: Annotated[list[str] | None, typer.Option(help="A family by name, several times if wanted; all if left out.")] = None,
    more: Annotated[bool, typer.Option("--more", help="The families that need next to no code of their own, instead.")] = False,
    as_released: Annotated[bool, typer.Option("--released", help="With the settings of released models, instead.")] = False,
    dtype: Annotated[str, typer.Option(help="float64 or float32")] = "float64",
    seed: int = 0,
) -> None:
    """Print the table as Markdown."""
    logging.set_verbosity_error()
    if as_released:
        chosen = [each for each in RELEASED if not family or each.family in family]
        typer.echo(markdown(released(chosen, seed=seed)))
        return
    typer.echo(markdown(families(family or list(MORE if more else FAMILIES), getattr(torch, dtype), seed)))


if __name__ == "__main__":
    typer.run(main)
