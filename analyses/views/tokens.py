"""Tokens coloured by signed relevance: one value per token, or several (layers, methods) to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from analyses.views.heatmap import HeatMap, heat_map_view
from analyses.views.markup import as_array, check_tokens, one_example, round_significant, rounded, show_token
from analyses.views.page import View
from analyses.views.palette import INK, LINE, NEGATIVE, POSITIVE, SIGNED, add_scale, limit_of, new_figure
from analyses.views.scripts import CIRCUITSVIS
from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import RelevanceError

# CircuitsVis shows several values with 6 decimals; smaller numbers are shown in a smaller unit.
_SMALLEST_LIMIT = 1e-3
_CHARACTERS_PER_LINE = 100
_PADDING = 0.9  # around a token, in characters: tokenizers differ in whether a token carries its space


def token_view(
    tokens: Sequence[str] | RelevanceCache,
    relevance: Float[Tensor | np.ndarray, "*batch pos"] | None = None,
    title: str = "Relevance of each token",
) -> View:
    """Tokens coloured by signed relevance (CircuitsVis `colored_tokens`): blue speaks for the target, red against it.

    Args:
        tokens: one string per position, as `model.to_str_tokens` gives them; or a whole RelevanceCache of one example, and nothing else.
        relevance: one number per position ([pos], or [1, pos]), in the target's unit; shown on hover with 6 significant digits.

    Raises:
        RelevanceError: another number of tokens than of values, or a value that is not finite.
    """
    if isinstance(tokens, RelevanceCache):
        cache = one_example(tokens)
        tokens, relevance = cache.token_strings(), cache.tokens()
    if relevance is None:
        raise RelevanceError(
            "token_view needs the tokens' relevance beside the tokens: token_view(tokens, cache.tokens()), or token_view(cache)"
        )
    values = as_array(relevance, "relevance")
    values = values[0] if values.ndim == 2 and len(values) == 1 else values  # a batch of one, as `cache.tokens()` gives it
    tokens = check_tokens(tokens, len(values), "relevance")
    limit = limit_of(values)
    props = {
        "tokens": [inert(token) for token in tokens],
        "values": rounded(values),
        "minValue": -round_significant(limit),
        "maxValue": round_significant(limit),
        "negativeColor": NEGATIVE,
        "positiveColor": POSITIVE,
    }
    return View(title, lambda: _text_figure(tokens, values, limit), component="ColoredTokens", props=props, script=CIRCUITSVIS)


def token_multi_view(
    tokens: Sequence[str],
    relevance: Mapping[str, Float[Tensor | np.ndarray, " pos"]] | pd.DataFrame,
    title: str = "Relevance of each token",
    *,
    shared_scale: bool = True,
) -> View:
    """Tokens coloured by one of several signed values (CircuitsVis `colored_tokens_multi`): layers, methods or neurons to choose from.

    Args:
        tokens: one string per position.
        relevance: name -> one number per position, or a DataFrame with one row per position and one column per name.
        shared_scale: one colour scale for all names. Switch it off for methods whose numbers have different units: each is then divided
            by its largest magnitude, and the names say so.

    Raises:
        RelevanceError: a column of another length than the tokens, no column, or a value that is not finite.
    """
    columns = {str(name): as_array(column, f"relevance[{name!r}]") for name, column in relevance.items()}
    if not columns:
        raise RelevanceError("relevance is empty: give at least one name with one value per token")
    for name, column in columns.items():
        tokens = check_tokens(tokens, len(column), f"relevance[{name!r}]")
    if not shared_scale:
        columns = {f"{name} / {limit_of(column):.3g}": column / limit_of(column) for name, column in columns.items()}
    values = np.stack(list(columns.values()), axis=1)
    limit = limit_of(values)
    if limit < _SMALLEST_LIMIT:
        exponent = int(np.floor(np.log10(limit)))
        values, limit = values / 10.0**exponent, limit / 10.0**exponent
        columns = {f"{name} (1e{exponent})": values[:, i] for i, name in enumerate(columns)}
    names = list(columns)
    props = {
        "tokens": [inert(token) for token in tokens],
        "values": rounded(values),
        "labels": names,
        "positiveBounds": [round_significant(limit)] * len(names),
        "negativeBounds": [-round_significant(limit)] * len(names),
    }
    heat_map = HeatMap(title, values.T, names, [show_token(token) for token in tokens], "", "token", limit)
    figure = heat_map_view(title, [heat_map]).figure
    return View(title, figure, component="ColoredTokensMulti", props=props, script=CIRCUITSVIS)


def inert(token: str) -> str:
    """A token that CircuitsVis shows as text.

    CircuitsVis writes tokens with innerHTML in one place and as text in another, so escaping them would show `&lt;` in the second, and
    not escaping them would run them in the first. A word joiner (invisible, no width) after `<` and `&` keeps both from starting markup:
    the HTML standard reads `<` as text unless a letter, `/`, `!` or `?` follows, and `&` unless a letter, digit or `#` does.
    """
    return token.replace("<", "<\u2060").replace("&", "&\u2060").replace("\r", "").replace("\n", "↵\n")


def _text_figure(tokens: Sequence[str], values: np.ndarray, limit: float) -> Figure:
    """The tokens as running text in a monospaced font, each on its colour."""
    cells: list[tuple[int, float, float, str, float]] = []  # line, left, width, text, value
    line, left = 0, 0.0
    for token, value in zip(tokens, values, strict=True):
        text = token.replace("\n", "↵").replace("\t", "⇥").strip(" ") or "␣"
        wide = len(text) + _PADDING
        if left and left + wide > _CHARACTERS_PER_LINE:
            line, left = line + 1, 0.0
        cells.append((line, left, wide, text, float(value)))
        left += wide
        if "\n" in token:
            line, left = line + 1, 0.0
    lines = cells[-1][0] + 1 if cells else 1
    width = max((left + wide for _, left, wide, _, _ in cells), default=1.0)
    figure = new_figure(width * 0.079 + 0.1, lines * 0.27 + 0.08)
    axis = figure.add_subplot()
    axis.set(xlim=(0, width), ylim=(lines, 0))
    axis.set_axis_off()
    for row, left, wide, text, value in cells:
        red, green, blue, _ = colour = SIGNED((value / limit + 1) / 2)
        axis.add_patch(Rectangle((left + 0.06, row + 0.06), wide - 0.12, 0.88, facecolor=colour, edgecolor=LINE, linewidth=0.5))
        ink = "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else INK
        middle = left + wide / 2
        axis.text(middle, row + 0.5, text, family="monospace", fontsize=9, color=ink, ha="center", va="center", parse_math=False)
    add_scale(figure, limit)
    return figure
