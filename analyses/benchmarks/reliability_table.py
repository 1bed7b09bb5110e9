"""The tables of docs/measurements/reliability.md, from the rows that `reliability` keeps.

    python -m analyses.benchmarks.reliability_table docs/measurements/results --page docs/measurements/reliability.md

Two files: `reliability.csv` has a row for each model, task, seed, kind of component and method; `reliability_certified.csv` one for each
ranking that was certified. A run that is repeated takes the place of the earlier one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses.benchmarks.tables import markdown, write_table
from analyses.evaluation.comparison import Comparison

MEASURED, CERTIFIED = "reliability.csv", "reliability_certified.csv"
RUN = ["model", "task", "seed"]
CHOSEN_ON = [("embedded", "ioi", 0), ("embedded", "induction", 0), ("stories260k", "pronoun", 0)]
"""Where shares, widths and the limit of flags were chosen."""
_OWN = "combined"
_ORDER = {"ioi": 0, "agreement": 1, "induction": 2, "pronoun": 3} | {
    c: i for i, c in enumerate(("resid", "attn", "mlp", "heads", "v", "q", "k"))
}


def measured(found: Comparison) -> list[dict[str, object]]:
    """A row for each kind of component and method; of the first method with intervals also how these and the flags did."""
    assert found.bracketed is not None
    name, held = found.bracketed
    rows: list[dict[str, object]] = []
    for component, coverage in held.items():
        wrong = round(coverage.wrong * coverage.n)
        counts = {"inside": coverage.inside, "flagged": coverage.flagged, "wrong": wrong}
        counts["found"] = round(coverage.recall * wrong) if wrong else 0
        for row in found.table[found.table["component"] == component].to_dict("records"):
            measures = {f"{m}{end}": row[f"{m}{end}"] for m in ("pearson", "spearman") for end in ("", "_low", "_high")}
            rows.append(
                {"component": component, "n": coverage.n, "method": row["method"]} | measures | (counts if row["method"] == name else {})
            )
    return rows


def certified_row(ranking: pd.DataFrame, effects: dict[tuple[int, int], float], *, places: int, what: str) -> dict[str, object]:
    """Whether the certified top is that of patching everything.

    Args:
        ranking: with its certificate.
        effects: effects of exhaustive patching by (layer, index).
        places: how long the top is.
        what: the kind of component, in words.
    """
    best = set(sorted(effects, key=lambda node: -abs(effects[node]))[:places])
    settled = set(zip(ranking["layer"][:places], ranking.iloc[:places, 1], strict=True))
    certificate = ranking.attrs["certificate"]
    return {
        "what": what,
        "right": f"{len(best & settled)} of {places}",
        "patched": f"{certificate.patched} of {certificate.n}",
        "rounds": certificate.rounds,
        "forwards": f"{certificate.forwards} of {certificate.sweep}",
        "share": round(certificate.forwards / certificate.sweep, 3),
    }


def keep(rows: list[dict[str, object]], file: Path, key: list[str]) -> None:
    """Put rows into a file of results, in the place of earlier ones of the same key."""
    new = pd.DataFrame(rows)
    both = pd.concat([pd.read_csv(file), new]) if file.exists() else new
    file.parent.mkdir(parents=True, exist_ok=True)
    both.drop_duplicates(key, keep="last").sort_values(key, kind="stable").to_csv(file, index=False, float_format="%.5g")


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each model, task, seed and kind of component, as one reads it."""
    text = []
    for (task, seed, component), here in _grouped(rows, ["task", "seed", "component"]):
        own, others = _own(here), here[here["method"] != _OWN]
        best: Any = others.iloc[int(others["pearson"].argmax())]
        text.append(
            {
                "task": f"{task}, seed {seed}" if rows["seed"].nunique() > 1 else task,
                "component": component,
                "n": own["n"],
                "Pearson (95 %)": _interval(own, "pearson"),
                "Spearman (95 %)": _interval(own, "spearman"),
                "best other": f"`{best['method']}` {best['pearson']:.3f}",
                "intervals that hold": f"{own['inside']:.3f}",
                "flagged": f"{own['flagged']:.3f}",
                "off by > 20 %": f"{own['wrong']:.0f}",
                "of these flagged": f"{own['found']:.0f}" if own["wrong"] else "–",
            }
        )
    return pd.DataFrame(text)


def over_tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and worst correlation of each kind of component over tasks and seeds."""
    text = []
    for (component,), here in _grouped(rows[rows["method"] == _OWN], ["component"]):
        worst: Any = here.iloc[int(here["pearson"].argmin())]
        text.append(
            {
                "over tasks": component,
                "mean Pearson": f"{here['pearson'].mean():.3f}",
                "worst (task)": f"{worst['pearson']:.3f} ({worst['task']})",
                "mean Spearman": f"{here['spearman'].mean():.3f}",
                "worst": f"{here['spearman'].min():.3f}",
            }
        )
    return pd.DataFrame(text)


def uses(rows: pd.DataFrame) -> pd.DataFrame:
    """How intervals and flags did where they were chosen, where not, and on the real model."""
    own = rows[rows["method"] == _OWN]
    chosen = pd.Series([run in CHOSEN_ON for run in own[RUN].itertuples(index=False, name=None)], index=own.index)
    small = own["model"].isin({model for model, *_ in CHOSEN_ON})
    parts = {
        "small models, chosen on": own[chosen],
        "small models, not chosen on": own[small & ~chosen],
        "other models": own[~small],
        "all that nothing was chosen on": own[~chosen],
    }
    text = []
    for name, here in ((name, here) for name, here in parts.items() if len(here)):
        inside = (here["inside"] * here["n"]).groupby(here["component"]).sum() / here.groupby("component")["n"].sum()
        cell: Any = here.iloc[int(here["inside"].argmin())]
        text.append(
            {
                "use": name,
                "runs": ", ".join(dict.fromkeys(f"{row.model} {row.task} {row.seed}" for row in here.itertuples())),
                "n": f"{here['n'].sum():,}",
                "intervals that hold": f"{(here['inside'] * here['n']).sum() / here['n'].sum():.3f}",
                "worst kind": f"{inside.idxmin()} {inside.min():.3f}",
                "worst cell": f"{cell['task']} {cell['component']} {cell['inside']:.3f} of {cell['n']}",
                "flagged": f"{(here['flagged'] * here['n']).sum() / here['n'].sum():.3f}",
                "off by > 20 %": f"{here['wrong'].sum():.0f}",
                "of these flagged": f"{here['found'].sum():.0f}",
            }
        )
    return pd.DataFrame(text)


def by_method(rows: pd.DataFrame, components: tuple[str, ...] = ("q", "k")) -> pd.DataFrame:
    """Pearson of each method over queries and keys, a column for each task."""
    here = rows[rows["component"].isin(components)]
    table = here.pivot(index="method", columns=["task", "component"], values="pearson").map("{:.3f}".format)
    table.columns = pd.Index([" ".join(map(str, column)) for column in table.columns])
    return table.rename(index="`{}`".format).reset_index()


def certified(rows: pd.DataFrame) -> pd.DataFrame:
    """A row for each certified ranking."""
    text = rows.assign(share=rows["share"].map("{:.3f}".format), seed=rows["seed"].astype(str))
    return text[["model", "task", "seed", "what", "right", "patched", "rounds", "forwards", "share"]]


def _grouped(rows: pd.DataFrame, key: list[str]) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    return sorted(rows.groupby(key), key=lambda group: [_ORDER.get(part, part) for part in group[0]])


def _own(rows: pd.DataFrame) -> Any:
    return rows[rows["method"] == _OWN].iloc[0]


def _interval(row: Any, name: str) -> str:
    return f"{row[name]:.3f} ({row[f'{name}_low']:.3f} to {row[f'{name}_high']:.3f})"


def tables(folder: Path) -> dict[str, tuple[pd.DataFrame, str, str]]:
    """By name: the table, what its numbers are, and when they were measured."""
    rows, tops = pd.read_csv(folder / MEASURED), pd.read_csv(folder / CERTIFIED)
    found: dict[str, tuple[pd.DataFrame, pd.DataFrame, str]] = {}
    for model, here in rows.groupby("model"):
        pairs = ", ".join(f"{n} pairs of {task}" for (task, n), _ in here.groupby(["task", "pairs"]))
        about = f"{model}, {pairs}, seeds {', '.join(map(str, sorted(here['seed'].unique())))}"
        found[str(model)] = shown(here), here, f"{about}; `combined`, in brackets 95 % intervals over 200 resamples of the pairs"
        found[f"{model}, over tasks"] = over_tasks(here), here, f"{about}; `combined`"
        first = here[here["seed"] == 0]
        found[f"{model}, queries and keys"] = by_method(first), first, f"{about}, of which seed 0; Pearson with patching"
    found["intervals and flags"] = uses(rows), rows, "`combined`; models, tasks and seeds as in the table"
    found["certified"] = certified(tops), tops, "The first 10, against patching all; pairs as above"
    return {name: (table, settings, " and ".join(sorted(of["measured"].unique()))) for name, (table, of, settings) in found.items()}


def main(
    folder: Annotated[Path, typer.Argument(help="Where the files of results are.")],
    *,
    page: Annotated[Path, typer.Option(help="The page with the tables' places.")],
) -> None:
    """Write those tables that the page has a place for."""
    text = page.read_text(encoding="utf-8")
    for name, (table, settings, when) in tables(folder).items():
        if f"<!-- table: {name} -->" in text:
            command = f"analyses.benchmarks.reliability_table docs/measurements/{folder.name} --page docs/measurements/{page.name}"
            write_table(page, name, markdown(table), command=command, settings=settings, measured=when)


if __name__ == "__main__":
    typer.run(main)
