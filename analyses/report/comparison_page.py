"""The comparison of methods as one HTML page."""

from __future__ import annotations

import pandas as pd

from analyses.components import COMPONENTS, Node
from analyses.evaluation.agreement import correlation_in_words
from analyses.evaluation.comparison import Comparison
from analyses.views import Page, View, scatter_view
from analyses.views.heads import head_heat_map
from analyses.views.heatmap import heat_map_view, largest_limit

_WORDS = {component.name: component.label for component in COMPONENTS.values()}
_YARDSTICKS = {"mean": "mean of denoising and noising", "denoising": "denoising", "noising": "noising"}
_SHOWN_MAPS = 6
UNDEFINED = "A correlation is undefined where there is a single component, or where one side gives all of them the same number."


def correlation_table(table: pd.DataFrame, brief: bool = False) -> pd.DataFrame:
    """Pearson and cost per method: what people want to know first. `brief`: no intervals and short names, for a terminal."""
    cells = table.assign(cell=[correlation_in_words(r) for r in table["pearson"]])
    if not brief:
        cells["cell"] += "\u00a0" + _intervals(table)
    wide = cells.pivot(index="method", columns="component", values="cell").reindex(list(dict.fromkeys(table["method"]))).fillna("–")
    wide = wide[[name for name in _WORDS if name in wide.columns]]
    cost = table.groupby("method", sort=False)[["completeness", "forwards", "backwards", "seconds"]].first()
    cost.insert(1, "passes", [f"{f}\u00a0+\u00a0{b}" for f, b in zip(cost.pop("forwards"), cost.pop("backwards"), strict=True)])
    return (wide if brief else wide.rename(columns=_WORDS)).join(cost).rename_axis("method").reset_index()


def best_methods(table: pd.DataFrame) -> pd.DataFrame:
    """The best method of each component, by Pearson."""
    best = table[table["pearson"].notna()]
    best = best.loc[best.groupby("component", sort=False)["pearson"].idxmax()]
    named = best[["component", "method", "pearson"]].assign(component=best["component"].map(_WORDS))
    return named.assign(**{"95 % interval": _intervals(best)}).reset_index(drop=True)


def _intervals(table: pd.DataFrame) -> pd.Series:
    """The bootstrap interval of each row, without zeros before the point and in one piece; nothing where none was drawn."""
    bounds = zip(table["pearson_low"], table["pearson_high"], strict=True)
    texts = ["" if low != low else f"[{low:.3f},\u00a0{high:.3f}]".replace("0.", ".") for low, high in bounds]
    return pd.Series(texts, index=table.index)


def comparison_page(comparison: Comparison, model: str, target: str, *, words: str, command: str) -> Page:
    """The page: the table, the heads side by side, and each component's best method against patching."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    page = Page("Which method can be trusted here?", f"{'The embedded model' if name == 'embedded' else name}: {words}.")
    page.heading("The answer")
    page.prose(
        "Activation patching measures what each component does to the target by running the model again for each of them. The methods "
        "below estimate it from a few passes. The table shows how closely: Pearson's correlation with patching "
        f"({_YARDSTICKS[comparison.direction]}, {comparison.n_pairs} pairs; 1 is perfect) and its 95 % bootstrap interval; how far the "
        "scores are from adding up (completeness, 0 is best); and the cost, in forward + backward passes over each pair and in seconds. "
        f"Patching itself took {comparison.patching_seconds:.1f} seconds."
    )
    page.table(correlation_table(comparison.table), "Pearson's correlation with activation patching, best method first.")
    page.table(best_methods(comparison.table), "The best method for each kind of component.")
    if "heads" in set(comparison.table["component"]):
        page.heading("The heads, side by side")
        page.prose("All on one scale: a method that is right about the ranking but wrong about the size looks paler or darker.")
        page.view(heads_view(comparison))
    page.heading("Component by component")
    best_by_component = best_methods(comparison.table).set_index("component")["method"]
    if comparison.table["pearson"].isna().any():
        page.prose(UNDEFINED)
    for component in dict.fromkeys(comparison.table["component"]):
        if _WORDS[component] not in best_by_component:
            continue
        best = best_by_component[_WORDS[component]]
        page.view(
            _scatter(comparison, component, str(best)),
            f"One point per layer and {COMPONENTS[component].index}; on the dashed line both say the same.",
        )
    page.heading("All figures")
    page.details("Every measure, method and component", comparison.table)
    page.details("Every score", comparison.scores)
    page.facts({"Target": target, "To do it again": command})
    return page


def heads_view(comparison: Comparison) -> View:
    """Patching and the best methods as heat maps of the heads on one scale."""
    heads = comparison.table[comparison.table["component"] == "heads"]
    names = ["patching", *heads["method"]][: _SHOWN_MAPS + 1]
    grids = {name: comparison.heads(name) for name in names}
    limit = largest_limit(list(grids.values()))
    return heat_map_view("Heads by patching and by each method", [head_heat_map(grid, name, limit) for name, grid in grids.items()])


def _scatter(comparison: Comparison, component: str, method: str) -> View:
    rows = comparison.scores[comparison.scores["component"] == component]
    axis = COMPONENTS[component].index
    names = [str(Node(component, layer, **{axis: index})) for layer, index in zip(rows["layer"], rows["index"], strict=True)]
    named = rows.assign(name=names)
    title = f"{_WORDS[component][0].upper()}{_WORDS[component][1:]}: {method} against patching"
    return scatter_view(
        named[["name", "patching", method]],
        "patching",
        method,
        label="name",
        title=title,
    )
