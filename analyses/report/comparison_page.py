"""The comparison of methods as one HTML page."""

from __future__ import annotations

import pandas as pd

from analyses.components import COMPONENTS, Node
from analyses.evaluation.agreement import correlation_in_words
from analyses.evaluation.comparison import Comparison
from analyses.views import Page, View, scatter_view
from analyses.views.heads import head_heat_map
from analyses.views.heatmap import heat_map_view, largest_limit
from analyses.views.intervals import interval_view

_WORDS = {component.name: component.label for component in COMPONENTS.values()}
_YARDSTICKS = {"mean": "mean of denoising and noising", "denoising": "denoising", "noising": "noising"}
_SHOWN_MAPS = 6
UNDEFINED = "A correlation is undefined where there is a single component, or where one side gives all of them the same number."


def correlation_table(table: pd.DataFrame, brief: bool = False) -> pd.DataFrame:
    """Pearson, Spearman and cost per method: what people want to know first; worst is the smallest Pearson of the row.

    Args:
        brief: no intervals and short names, Spearman under Pearson, for a terminal.
    """
    pearson, spearman = ([correlation_in_words(r) for r in table[name]] for name in ("pearson", "spearman"))
    if brief:
        texts = [f"{r}\n{rho}" for r, rho in zip(pearson, spearman, strict=True)]
    else:
        bounds = zip(pearson, _intervals(table), spearman, _intervals(table, "spearman"), strict=True)
        texts = [f"{r}\u00a0{r_interval} / {rho}\u00a0{rho_interval}" for r, r_interval, rho, rho_interval in bounds]
    cells = table.assign(cell=texts)
    wide = cells.pivot(index="method", columns="component", values="cell").reindex(list(dict.fromkeys(table["method"]))).fillna("–")
    wide = wide[[name for name in _WORDS if name in wide.columns]]
    cost = table.groupby("method", sort=False)[["completeness", "forwards", "backwards", "seconds"]].first()
    cost.insert(1, "passes", [f"{f}\u00a0+\u00a0{b}" for f, b in zip(cost.pop("forwards"), cost.pop("backwards"), strict=True)])
    wide = wide if brief else wide.rename(columns=_WORDS)
    if len(wide.columns) > 1:
        wide["worst"] = table.groupby("method", sort=False)["pearson"].min()
    return wide.join(cost.drop(columns=["completeness", "seconds"]) if brief else cost).rename_axis("method").reset_index()


def best_methods(table: pd.DataFrame) -> pd.DataFrame:
    """The best method of each component, by Pearson."""
    best = table[table["pearson"].notna()]
    best = best.loc[best.groupby("component", sort=False)["pearson"].idxmax()]
    named = best[["component", "method", "pearson"]].assign(component=best["component"].map(_WORDS))
    return named.assign(**{"95 % interval": _intervals(best)}).reset_index(drop=True)


def _intervals(table: pd.DataFrame, measure: str = "pearson") -> pd.Series:
    """The bootstrap interval of each row, without zeros before the point and in one piece; nothing where none was drawn."""
    bounds = zip(table[f"{measure}_low"], table[f"{measure}_high"], strict=True)
    texts = ["" if low != low else f"[{low:.3f},\u00a0{high:.3f}]".replace("0.", ".") for low, high in bounds]
    return pd.Series(texts, index=table.index)


def comparison_page(comparison: Comparison, model: str, target: str, *, words: str, command: str) -> Page:
    """The page: the table, the heads side by side, and each component's best method against patching."""
    name = model.rstrip("/").rsplit("/", 1)[-1]
    page = Page("Which method can be trusted here?", f"{'The embedded model' if name == 'embedded' else name}: {words}.")
    page.heading("The answer")
    page.prose(
        "Activation patching measures what each component does to the target by running the model again for each of them. The methods "
        "below estimate it from a few passes. The table shows how closely: Pearson's and Spearman's correlation with patching "
        f"({_YARDSTICKS[comparison.direction]}, {comparison.n_pairs} pairs; 1 is perfect), each with its 95 % bootstrap "
        "interval; how far the "
        "scores are from adding up (completeness, 0 is best); and the cost, in forward + backward passes over each pair and in seconds. "
        f"Patching itself took {comparison.patching_seconds:.1f} seconds."
    )
    page.table(correlation_table(comparison.table), "Pearson's / Spearman's correlation with activation patching, best method first.")
    page.table(best_methods(comparison.table), "The best method for each kind of component.")
    _yardstick(page, comparison)
    _intervals_section(page, comparison)
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


def _yardstick(page: Page, comparison: Comparison) -> None:
    page.heading("Can the yardstick be trusted?")
    page.prose(
        "Patching swaps one component at a time. Where components are needed together, or can replace each other, single swaps say little, "
        "and a low correlation then speaks against the question and not against a method."
    )
    for doubt in comparison.doubts:
        page.prose(f"**Doubtful.** {doubt[0].upper()}{doubt[1:]}.")
    if not comparison.doubts:
        page.prose("Nothing speaks against it here.")
    page.table(yardstick_shown(comparison), "Checks of activation patching itself.")


def yardstick_shown(comparison: Comparison) -> pd.DataFrame:
    """The checks of the yardstick in words."""
    table = comparison.yardstick
    columns = {
        "component": [_WORDS[name] for name in table["component"]],
        "sum / gap": [_two_decimals(x) for x in table["sum_over_gap"]],
        "denoising with noising": [_two_decimals(x) for x in table["directions"]],
        "above noise": ["–" if x != x else f"{x:.0f} of {n}" for x, n in zip(table["above_noise"], table["n"], strict=True)],
        "near zero": [f"{x:.0%}" for x in table["near_zero"]],
    }
    return pd.DataFrame(columns)


def _two_decimals(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def coverage_lines(comparison: Comparison) -> list[str]:
    """How the intervals did, one sentence per component; none where no method has intervals."""
    if comparison.bracketed is None:
        return []
    method, held = comparison.bracketed
    return [f"{_WORDS[name]}, {method}: {found}" for name, found in held.items()]


def _intervals_section(page: Page, comparison: Comparison) -> None:
    if comparison.bracketed is None:
        return
    method, held = comparison.bracketed
    page.heading("How far each score can be trusted")
    page.prose(
        "Several estimates of the same effect are right under different conditions; where they differ, the effect lies somewhere around "
        "them. A bar is the interval in which the patched value is to be expected, a dot the score, a ring what patching found."
    )
    for name, line in zip(held, coverage_lines(comparison), strict=True):
        rows = comparison.scores[comparison.scores["component"] == name]
        shown = rows.assign(name=_names(name, rows), score=rows[method])[["name", "score", "low", "high", "reliable", "patching"]]
        title = f"{_WORDS[name][0].upper()}{_WORDS[name][1:]}: {method} and its intervals"
        page.view(interval_view(shown.dropna(subset=["patching"]), title=title), f"{line}.")


def _names(component: str, rows: pd.DataFrame) -> list[str]:
    """Its nodes as text."""
    axis = COMPONENTS[component].index
    return [str(Node(component, int(layer), **{axis: int(index)})) for layer, index in zip(rows["layer"], rows["index"], strict=True)]


def heads_view(comparison: Comparison) -> View:
    """Patching and the best methods as heat maps of the heads on one scale."""
    heads = comparison.table[comparison.table["component"] == "heads"]
    names = ["patching", *heads["method"]][: _SHOWN_MAPS + 1]
    grids = {name: comparison.heads(name) for name in names}
    limit = largest_limit(list(grids.values()))
    return heat_map_view("Heads by patching and by each method", [head_heat_map(grid, name, limit) for name, grid in grids.items()])


def _scatter(comparison: Comparison, component: str, method: str) -> View:
    rows = comparison.scores[comparison.scores["component"] == component]
    named = rows.assign(name=_names(component, rows))
    title = f"{_WORDS[component][0].upper()}{_WORDS[component][1:]}: {method} against patching"
    return scatter_view(
        named[["name", "patching", method]],
        "patching",
        method,
        label="name",
        title=title,
    )
