"""Rows of the benchmark of reliability: one per kind of component, their worst cases, and certified tops."""

from __future__ import annotations

import pandas as pd

from analyses.evaluation.comparison import Comparison


def measured(found: Comparison) -> list[dict[str, object]]:
    """A row of numbers per kind of component: how the first method with intervals did, and the best of the others."""
    assert found.bracketed is not None
    name, held = found.bracketed
    rows: list[dict[str, object]] = []
    for component, coverage in held.items():
        here = found.table[found.table["component"] == component].set_index("method")
        own, others = here.to_dict("index")[name], here.drop(index=name)["pearson"]
        measures = ("pearson", "pearson_low", "pearson_high", "spearman", "spearman_low", "spearman_high")
        rows.append(
            {"component": component, "n": coverage.n}
            | {measure: own[measure] for measure in measures}
            | {"other": str(others.idxmax()), "other_pearson": float(others.max())}
            | {"inside": coverage.inside, "flagged": coverage.flagged}
            | {"wrong": round(coverage.wrong * coverage.n)}
            | {"found": 0 if coverage.recall != coverage.recall else round(coverage.recall * coverage.wrong * coverage.n)}
        )
    return rows


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """The rows as one reads them."""
    text = table[["task", "seed", "component", "n"]].copy()
    for measure in ("pearson", "spearman"):
        values = zip(table[measure], table[f"{measure}_low"], table[f"{measure}_high"], strict=True)
        text[measure] = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, low, high in values]
    text["best other"] = [f"{other} {value:.3f}" for other, value in zip(table["other"], table["other_pearson"], strict=True)]
    text["inside"], text["flagged"] = table["inside"].map("{:.3f}".format), table["flagged"].map("{:.3f}".format)
    text["wrong"], text["of these flagged"] = (
        table["wrong"],
        ["–" if not w else f for w, f in zip(table["wrong"], table["found"], strict=True)],
    )
    return text


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Over tasks and seeds: mean and worst correlation, the most that another method is ahead by, and how intervals and flags did."""
    rows = []
    for component, here in [*table.groupby("component", sort=False), ("all", table)]:
        worst, behind = here.loc[here["pearson"].idxmin()], here["other_pearson"] - here["pearson"]
        n = here["n"].sum()
        rows.append(
            {
                "component": component,
                "n": n,
                "Pearson": f"{here['pearson'].mean():.3f}, worst {worst['pearson']:.3f} ({worst['task']}, seed {worst['seed']})",
                "Spearman": f"{here['spearman'].mean():.3f}, worst {here['spearman'].min():.3f}",
                "behind the best other by at most": f"{max(behind.max(), 0):.3f}",
                "inside": f"{(here['inside'] * here['n']).sum() / n:.3f}, worst {here['inside'].min():.3f}",
                "flagged": f"{(here['flagged'] * here['n']).sum() / n:.3f}",
                "wrong": here["wrong"].sum(),
                "of these flagged": here["found"].sum(),
            }
        )
    return pd.DataFrame(rows)


def certified_row(ranking: pd.DataFrame, effects: dict[tuple[int, int], float], *, places: int, what: str) -> dict[str, object]:
    """Whether the certified top is that of patching everything.

    Args:
        ranking: with its certificate.
        effects: effects of exhaustive patching by (layer, index).
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
        "share": f"{certificate.forwards / certificate.sweep:.3f}",
    }
