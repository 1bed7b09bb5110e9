"""Text and numbers on their way into HTML: everything that may come from a prompt passes through here."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from lens_relevance.cache import RelevanceCache
from lens_relevance.errors import RelevanceError
from lens_relevance.shown_text import visible

# In a script these could end it, open a comment, or break a line inside a string literal (JSON allows U+2028, older JavaScript does not).
_SCRIPT_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_WHITESPACE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def escape(text: object) -> str:
    """Text for HTML content or a quoted attribute."""
    return html.escape(visible(text, keep="\n\t\r"), quote=True)


def script_json(value: Any) -> str:
    """JSON that is safe inside a `<script>`: no character of it can end the script or be read as markup.

    Raises:
        RelevanceError: a number that is not finite, which JSON cannot hold, or a value that cannot be shown.
    """
    try:
        text = json.dumps(_visible(value), allow_nan=False, separators=(",", ":"), ensure_ascii=True, default=_plain)
    except ValueError as error:
        raise RelevanceError(f"this cannot be shown on a page: {error}") from error
    return re.sub("[<>&\u2028\u2029]", lambda match: _SCRIPT_ESCAPES[match.group()], text)


def _visible(value: Any) -> Any:
    """The same with every text in it made visible."""
    if isinstance(value, str):
        return visible(value, keep="\n\t\r")
    if isinstance(value, Mapping):
        return {key: _visible(item) for key, item in value.items()}  # keys are our own
    return [_visible(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise RelevanceError(f"{type(value).__name__} cannot be shown on a page: give text, numbers, lists, dicts, arrays or tensors")


def as_array(values: Any, name: str) -> np.ndarray:
    """Tensor, array or nested list as float64 numpy.

    Raises:
        RelevanceError: a number that is not finite, or something that holds no numbers, such as a whole RelevanceCache.
    """
    if isinstance(values, Mapping):
        raise RelevanceError(
            f"{name} is a {type(values).__name__}, which holds many things: give the numbers of one, such as cache.tokens()[0] [pos] or "
            "cache.heads()[0].sum(0) [layer, head]"
        )
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()  # numpy knows no bfloat16
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise RelevanceError(f"{name} holds {bad} values that are not finite, which a picture would hide; look for the cause first")
    return array


def one_example(cache: RelevanceCache) -> RelevanceCache:
    """The cache, if it holds one example.

    Raises:
        RelevanceError: it holds several, which one picture cannot show.
    """
    if len(cache.value) != 1:
        raise RelevanceError(f"this cache holds {len(cache.value)} examples: give the numbers of one, such as cache.tokens()[0]")
    return cache


def check_tokens(tokens: Sequence[str], count: int, name: str) -> list[str]:
    """The tokens as a list; ValueError where `name` does not have one position per token."""
    if isinstance(tokens, str):
        raise RelevanceError("tokens is one string; give a list with one string per position, e.g. model.to_str_tokens(prompt)")
    if len(tokens) != count:
        raise RelevanceError(f"{name} has {count} positions but there are {len(tokens)} tokens; give those of one example, BOS included")
    return [str(token) for token in tokens]


def show_token(token: str) -> str:
    """A token as a label: outer spaces go, line breaks, tabs and control characters become visible, an empty one stays visible."""
    shown = visible("".join(_WHITESPACE.get(sign, sign) for sign in token))
    return shown.strip(" ") or "␣" * max(len(token), 1)


def short(label: str, length: int = 11) -> str:
    """A label cut to `length` characters, where a long one would take the picture's room."""
    return label if len(label) <= length else f"{label[: length - 1]}…"


def round_significant(value: float, digits: int = 6) -> float:
    """`value` to so many significant digits: what is sent to a page, where 17 digits would only cost room."""
    return float(f"{float(value):.{digits}g}")


def rounded(values: np.ndarray) -> Any:
    """The array as nested lists of numbers with 6 significant digits."""
    return _rounded(values.tolist())


def _rounded(values: Any) -> Any:
    return [_rounded(value) for value in values] if isinstance(values, list) else round_significant(values)


def format_number(value: float, signed: bool = True, digits: int = 3) -> str:
    """A number for people: so many significant digits, an exponent only where it must be, a real minus sign."""
    value = float(value)
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    sign = "+" if signed else ""
    if abs(value) < 1e-4:
        return f"{value:{sign}.{digits - 1}e}".replace("-", "−")
    return _fixed(value, max(digits - 1 - math.floor(math.log10(abs(value))), 0), signed)


def decimals_of(largest: float) -> int:
    """Decimals that give numbers up to `largest` three digits, the same for all of them, so that they line up."""
    return min(max(3 - math.ceil(math.log10(largest)), 0), 8) if largest > 0 else 0


def _fixed(value: float, decimals: int, signed: bool) -> str:
    """So many decimals; what rounds to zero has no sign."""
    text = f"{value:{'+' if signed else ''},.{decimals}f}"
    return text.lstrip("+-") if not text.strip("+-0.,") else text.replace("-", "−")


def inline_markup(text: str) -> str:
    """Escaped text in which `code` and **bold** are rendered; nothing else is markup."""
    escaped = escape(text)
    escaped = re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", escaped)


def table_html(frame: pd.DataFrame, caption: str = "", bars: Sequence[str] = ()) -> str:
    """A DataFrame as an HTML table; each numeric cell keeps its full value in `data-value`.

    Args:
        frame: what is shown. A named index becomes a column, an unnamed one is left out.
        bars: columns whose signed numbers also get a bar (blue right of zero, red left), all on one scale per column.
    """
    if missing := [name for name in bars if name not in frame.columns]:
        raise RelevanceError(f"the table has no column {missing[0]!r} to draw bars in; it has {list(map(str, frame.columns))}")
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    head = "".join(f'<th scope="col"{_align(frame.iloc[:, i])}>{escape(name)}</th>' for i, name in enumerate(frame.columns))
    cell_of = [_cell_maker(frame.iloc[:, i], name in bars) for i, name in enumerate(frame.columns)]
    rows = (
        "<tr>" + "".join(make(value) for make, value in zip(cell_of, row, strict=True)) + "</tr>" for row in frame.itertuples(index=False)
    )
    title = f"<caption>{inline_markup(caption)}</caption>" if caption else ""
    return f'<div class="lr-table"><table>{title}<thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def facts_html(facts: Mapping[str, object]) -> str:
    """Names and values, as a definition list."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{_fact(value)}</dd></div>" for name, value in facts.items())
    return f'<dl class="lr-facts">{rows}</dl>'


def _fact(value: object) -> str:
    return escape(format_number(value, signed=False, digits=4) if isinstance(value, float) else value)


def _align(column: pd.Series) -> str:
    return ' class="num"' if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column) else ""


def _largest(column: pd.Series) -> float:
    """The largest finite magnitude of a column of numbers, 0 where there is none."""
    numbers = pd.to_numeric(column, errors="coerce").abs()
    return float(numbers[np.isfinite(numbers)].max()) if np.isfinite(numbers).any() else 0.0


def _cell_maker(column: pd.Series, bars: bool) -> Callable[[Any], str]:
    """How the cells of a column are written: its real numbers all with as many decimals as the largest needs."""
    largest = _largest(column)

    def written(number: float) -> str:
        return format_number(number, bars) if largest < 1e-3 else _fixed(number, decimals_of(largest), bars)

    def cell(value: Any) -> str:
        if isinstance(value, bool | np.bool_):
            return f"<td>{'yes' if value else 'no'}</td>"
        if value is None or (isinstance(value, Real) and not math.isfinite(value)):
            return '<td class="num">–</td>'
        if isinstance(value, Integral):
            return f'<td class="num" data-value="{int(value)}">{int(value)}</td>'
        if not isinstance(value, Real):
            return f"<td>{escape(value)}</td>"
        number = float(value)
        if not bars:
            return f'<td class="num" data-value="{number!r}">{written(number)}</td>'
        share = abs(number) / (largest or 1.0)
        sign = "lr-neg" if number < 0 else "lr-pos"
        bar = f'<i class="{sign}" style="--v:{share:.4f}"></i>'
        return f'<td class="num lr-bar" data-value="{number!r}">{bar}<span>{written(number)}</span></td>'

    return cell
