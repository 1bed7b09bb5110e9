"""Pictures for papers: methods side by side, correlation, curves, conservation. Each carries the numbers it was drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from torch import Tensor

from analyses.views.heads import head_heat_map
from analyses.views.heatmap import heat_map_view, largest_limit
from analyses.views.markup import as_array, format_number, table_html
from analyses.views.page import View
from analyses.views.palette import CATEGORIES, INK, LINE, MUTED, POSITIVE, new_figure
from lens_relevance.errors import RelevanceError

_LABELLED_POINTS = 8
_MARKED_POINTS = 40  # more would be a caterpillar


def head_comparison_view(
    relevance: Float[Tensor | np.ndarray, "layer head"],
    patching: Float[Tensor | np.ndarray, "layer head"],
    names: tuple[str, str] = ("relevance", "patching"),
    *,
    title: str = "Heads: relevance beside activation patching",
) -> View:
    """Three head heat maps on one scale: relevance | patching | difference.

    Args:
        relevance: a score per head, in the unit of the target.
        patching: what it is compared with, in the same unit: the effect of activation patching.
        names: what the two are called.

    Raises:
        RelevanceError: two different shapes, or a value that is not finite.
    """
    first, second = as_array(relevance, names[0]), as_array(patching, names[1])
    if first.shape != second.shape:
        raise RelevanceError(f"{names[0]} has the shape {first.shape} and {names[1]} {second.shape}; both must be [layer, head]")
    limit = largest_limit([first, second, first - second])
    panels = [(names[0], first), (names[1], second), (f"{names[0]} − {names[1]}", first - second)]
    return heat_map_view(title, [head_heat_map(values, name, limit) for name, values in panels])


def scatter_view(frame: pd.DataFrame, x: str, y: str, *, label: str | None = None, title: str = "") -> View:
    """Column `y` against column `x`, one point per row, with Pearson's and Spearman's correlation.

    Args:
        frame: one row per component (head, edge, token). Rows in which either number is missing are left out.
        label: column with the names of the points; those farthest from the origin are written beside their points.

    Raises:
        RelevanceError: fewer than two rows have both numbers.
    """
    _need_columns(frame, [x, y, *([label] if label else [])])
    shown = frame.dropna(subset=[x, y])
    if len(shown) < 2:
        raise RelevanceError(f"a correlation needs at least 2 rows with both {x!r} and {y!r}; there are {len(shown)}")
    pearson, spearman = correlations(shown[x], shown[y])
    title = title or f"{y} against {x}"
    statistics = (
        f'<p class="lr-numbers">Pearson <b data-value="{pearson:.6g}">{format_number(pearson, False)}</b>, '
        f'Spearman <b data-value="{spearman:.6g}">{format_number(spearman, False)}</b>, '
        f'n = <b data-value="{len(shown)}">{len(shown)}</b></p>'
    )
    note = _numbers(shown[[*([label] if label else []), x, y]], statistics)
    line = f"Pearson {pearson:.3f}   Spearman {spearman:.3f}   n = {len(shown)}".replace("-", "−")
    return View(title, lambda: _scatter_figure(shown, x, y, label, line), note=note)


def curve_view(
    curves: Mapping[str, pd.Series], x_name: str, y_name: str, *, title: str, log_x: bool = False, baseline: float | int | None = None
) -> View:
    """Curves over one axis: perturbation (target against tokens removed), faithfulness (f against share of edges kept).

    Args:
        curves: name -> Series whose index is x and whose values are y. Names that share what stands before a comma (`relp, MoRF` and
            `relp, LeRF`) share a colour.
        log_x: logarithmic x axis, for shares from 0.1 % to 100 %; what is at 0 is then only in the table.
        baseline: y at which a dashed line is drawn, e.g. 1 for the whole model.

    Raises:
        RelevanceError: there are no curves.
    """
    if not curves:
        raise RelevanceError("there are no curves to draw: give at least one named Series")
    table = pd.DataFrame({name: series for name, series in curves.items()}).rename_axis(x_name)
    line = None if baseline is None else float(baseline)
    return View(title, lambda: _curve_figure(curves, x_name, y_name, log_x, line), note=_numbers(table))


def conservation_view(account: pd.DataFrame, title: str = "Conservation by layer") -> View:
    """Where the target's value went on its way down: the relevance left at each layer, and what was kept between two of them.

    Args:
        account: `cache.conservation()`: columns `layer`, `value` (the target), `relevance` (below that layer), and one column per sink
            (biases, norm, softmax, ...), in the target's unit. Several examples (column `example`) are averaged.
    """
    _need_columns(account, ["layer", "value", "relevance"])
    numbers = account.drop(columns="example", errors="ignore").groupby("layer", sort=False).mean(numeric_only=True)
    sinks = [name for name in numbers.columns if name not in ("value", "relevance")]
    # Sinks that keep nothing under this ruleset would only lengthen the legend.
    kept = [name for name in sinks if numbers[name].abs().max() > 1e-6 * max(numbers["value"].abs().max(), 1e-30)]
    return View(title, lambda: _conservation_figure(numbers, kept), note=_numbers(numbers[["value", "relevance", *kept]]))


def correlations(x: pd.Series, y: pd.Series) -> tuple[float, float]:
    """Pearson's and Spearman's correlation; NaN where one side is constant, since it then correlates with nothing."""
    if x.nunique() < 2 or y.nunique() < 2:
        return float("nan"), float("nan")
    return float(stats.pearsonr(x, y).statistic), float(stats.spearmanr(x, y).statistic)


def _need_columns(frame: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in frame.columns:
            raise RelevanceError(f"the table has no column {name!r}; it has {list(map(str, frame.columns))}")


def _numbers(frame: pd.DataFrame, before: str = "") -> str:
    return f"<details><summary>The numbers</summary>{before}{table_html(frame)}</details>"


def _scatter_figure(frame: pd.DataFrame, x: str, y: str, label: str | None, statistics: str) -> Figure:
    figure = new_figure(5.2, 4.4)
    axis = figure.add_subplot()
    horizontal, vertical = frame[x].to_numpy(float), frame[y].to_numpy(float)
    low, high = min(horizontal.min(), vertical.min()), max(horizontal.max(), vertical.max())
    axis.plot([low, high], [low, high], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axis.axhline(0, color=LINE, linewidth=0.8, zorder=0)
    axis.axvline(0, color=LINE, linewidth=0.8, zorder=0)
    axis.scatter(horizontal, vertical, s=20, color=POSITIVE, alpha=0.75, linewidths=0, zorder=2)
    if label:
        _name_points(axis, horizontal, vertical, [str(name) for name in frame[label]])
    axis.set(xlabel=x, ylabel=y)
    axis.set_title(statistics, loc="left", fontsize=9, color=MUTED)
    return figure


def _name_points(axis: Axes, x: np.ndarray, y: np.ndarray, names: list[str]) -> None:
    """Names beside the points farthest from the origin, on the side where there is room; none where a stronger one's name stands."""
    width, height = (np.ptp(x) or 1.0) * 0.13, (np.ptp(y) or 1.0) * 0.05
    placed: list[tuple[float, float]] = []
    far = np.hypot(x / (np.abs(x).max() or 1.0), y / (np.abs(y).max() or 1.0))
    for i in np.argsort(-far, kind="stable")[:_LABELLED_POINTS]:
        if far[i] < 0.05:
            break  # the crowd around zero
        for side, alignment in ((1, "left"), (-1, "right")):
            middle = (x[i] + side * width / 2, y[i])
            if all(abs(middle[0] - a) > width or abs(middle[1] - b) > height for a, b in placed):
                axis.annotate(
                    names[i], (x[i], y[i]), xytext=(5 * side, 0), textcoords="offset points", fontsize=8, ha=alignment, va="center"
                )
                placed.append(middle)
                break


def _curve_figure(curves: Mapping[str, pd.Series], x_name: str, y_name: str, log_x: bool, baseline: float | None) -> Figure:
    figure = new_figure(6.0, 3.9)
    axis = figure.add_subplot()
    if baseline is not None:
        axis.axhline(baseline, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    families = list(dict.fromkeys(name.partition(", ")[0] for name in curves))
    # Dashes as well as colours: curves stay apart in a black-and-white print.
    dashes = ["-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2))]
    members = dict.fromkeys(families, 0)
    for name, series in curves.items():
        family = name.partition(", ")[0]
        place = families.index(family)
        dash = dashes[(place if len(families) == len(curves) else members[family]) % 4]
        members[family] += 1
        if log_x:
            series = series[series.index > 0]
        x, y = series.index.to_numpy(float), series.to_numpy(float)
        marker = "o" if len(x) <= _MARKED_POINTS else ""
        axis.plot(x, y, label=name, color=CATEGORIES[place % len(CATEGORIES)], linestyle=dash, marker=marker, markersize=2.8)
    if log_x:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color=LINE, linewidth=0.6, alpha=0.7)
    axis.set(xlabel=x_name, ylabel=y_name)
    _add_legend(figure)
    return figure


def _add_legend(figure: Figure) -> None:
    """Above the picture, where it hides nothing and takes no width."""
    entries = sum(len(axis.get_legend_handles_labels()[0]) for axis in figure.axes)
    figure.legend(loc="outside upper left", ncols=entries if entries <= 3 else 2, frameon=False, fontsize=8, handlelength=2.6)


def _conservation_figure(numbers: pd.DataFrame, sinks: list[str]) -> Figure:
    figure = new_figure(max(5.4, 0.36 * len(numbers) + 0.8), 3.9)
    axis = figure.add_subplot()
    places = np.arange(len(numbers))
    for i, sink in enumerate(sinks):
        values = numbers[sink].to_numpy(float)
        earlier = numbers[sinks[:i]].to_numpy(float)
        # Positive amounts pile up from zero, negative ones hang from it.
        same_sign = np.where(np.sign(earlier) == np.sign(values)[:, None], earlier, 0.0).sum(axis=1)
        axis.bar(
            places, values, bottom=same_sign, width=0.7, color=CATEGORIES[i % len(CATEGORIES)], label=sink.replace("_", " "), alpha=0.85
        )
    axis.plot(places, numbers["relevance"], color=INK, marker="o", markersize=3.5, linewidth=1.3, label="goes on below")
    axis.axhline(0, color=MUTED, linewidth=0.8)
    axis.axhline(float(numbers["value"].iloc[0]), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="target")
    _name_ticks(axis, [str(name) for name in numbers.index])
    axis.set(xlabel="layer", ylabel="relevance")
    _add_legend(figure)
    return figure


def _name_ticks(axis: Axes, names: list[str]) -> None:
    steep = len(names) > 8 and max(map(len, names)) > 3
    axis.set_xticks(range(len(names)), names, rotation=60 if steep else 0, ha="right" if steep else "center")
