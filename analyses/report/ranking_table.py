"""A ranking as a table for a terminal, within 80 columns."""

from __future__ import annotations

import pandas as pd

from analyses.components import Node, resolve_component
from analyses.report.summary import number


def ranking_table(ranking: pd.DataFrame, component: str, top_k: int) -> pd.DataFrame:
    """The columns that one reads first, as text: name, score and its error, interval, flag (or that it was patched), stability.

    Args:
        ranking: as `rank_heads` gives it.
        component: what was ranked.
        top_k: what counted as "in the top".
    """
    kind = resolve_component(component)
    index = zip(ranking["layer"], ranking[kind.index], strict=True)
    scores = zip(ranking["score"], ranking["standard_error"], strict=True)
    columns = {
        kind.index: [str(Node(kind.name, int(layer), **{kind.index: int(i)})) for layer, i in index],
        "score": [number(score) + ("" if error != error else f" ±{error:.2f}") for score, error in scores],
    }
    if "low" in ranking:
        ends = zip(ranking["low"], ranking["high"], strict=True)
        columns["interval"] = [number(low) if low == high else f"{number(low)} to {number(high)}" for low, high in ends]
        columns["reliable"] = ["yes" if reliable else "no" for reliable in ranking["reliable"]]
        if "source" in ranking:
            columns["reliable"] = [
                "patched" if source == "patched" else word for source, word in zip(ranking["source"], columns["reliable"], strict=True)
            ]
    columns[f"in top {top_k}"] = ["–" if share != share else f"{share:.0%}" for share in ranking["top_frequency"]]
    columns["q"] = ["–" if q != q else f"{q:.3f}" for q in ranking["q_value"]]
    return pd.DataFrame(columns)


def ranking_notes(ranking: pd.DataFrame) -> list[str]:
    """What there is to say under the table, one sentence each."""
    notes = [
        f"in top {ranking.attrs['top_k']}: share of bootstrap resamples; q: false-discovery rate at which the score differs from 0",
        str(ranking.attrs["stability"]),
    ]
    if "low" in ranking:
        notes.insert(0, "interval: where the patched value is to be expected; reliable: within 10 % of the largest score on both sides")
    if "certificate" in ranking.attrs:
        notes.append(str(ranking.attrs["certificate"]))
    return notes
