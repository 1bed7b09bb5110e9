"""Colours and the plain matplotlib canvas that all pictures share.

Blue is positive, red is negative, zero is the colour of the paper. The two hues are ColorBrewer's RdBu ends, which people with every
common form of colour blindness tell apart, and they are CircuitsVis's convention too (positive blue, negative red).
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from PIL import Image

from analyses.output_files import MARK
from analyses.views.markup import format_number
from lens_relevance.shown_text import visible

POSITIVE = "#2166ac"
NEGATIVE = "#b2182b"
ZERO = "#ffffff"
INK = "#1b1f24"
MUTED = "#59636e"
LINE = "#d8dee4"
# Okabe and Ito's colour-blind-safe set without its yellow, for curves and stacked bars.
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")

SIGNED = LinearSegmentedColormap.from_list("signed_relevance", [NEGATIVE, ZERO, POSITIVE])

_WIDEST = 2000  # pixels
_SCALE_WIDTH, _SCALE_HEIGHT = 3.0, 0.32  # inches

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "text.parse_math": False,  # a token may hold a dollar sign
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "svg.hashsalt": "lens_relevance",  # the same picture is the same file
}


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that belongs to no GUI and to no pyplot state."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def figure_bytes(figure: Figure, file_format: str, dpi: int = 160) -> bytes:
    """The figure as a file: `"png"` or `"svg"`, without a date, so that equal figures are equal bytes."""
    metadata: dict[str, str | None] = {"Date": None, "Creator": MARK} if file_format == "svg" else {"Software": MARK}
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(visible(text.get_text()))
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Prompts hold signs that the plotting font lacks (CJK, emoji); a box in the static picture is not worth a warning per glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format=file_format, dpi=dpi, metadata=metadata)
    if file_format == "svg":  # labels of axes are made while it is drawn
        return visible(buffer.getvalue().decode("utf-8"), keep="\n\t\r").encode("utf-8")
    return buffer.getvalue()


def small_png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours, a third of the size: for pages and notebooks, which carry many.

    Sharp on a screen of double density, unless it is wider than any page. "Maximum coverage" keeps colours that are rare, such as the one
    red edge of a blue graph.
    """
    dpi = min(144, round(_WIDEST / figure.get_figwidth()))
    with Image.open(io.BytesIO(figure_bytes(figure, "png", dpi))) as image:
        buffer = io.BytesIO()
        colours = image.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        colours.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def styled() -> AbstractContextManager[None]:
    """Context in which figures are drawn in the shared style."""
    return matplotlib.rc_context(_STYLE)


def limit_of(values: Sequence[float] | np.ndarray) -> float:
    """The largest finite magnitude: both ends of a symmetric colour scale. 1 where all are zero, so that nothing divides by zero."""
    magnitudes = np.abs(np.asarray(values, dtype=float))
    finite = magnitudes[np.isfinite(magnitudes)]
    largest = float(finite.max()) if finite.size else 0.0
    return largest if largest > 0 else 1.0


def add_scale(figure: Figure, limit: float) -> None:
    """What the colours mean, from `-limit` to `limit`, in a line of its own below the picture (which must use the layout engine)."""
    width, height = (float(size) for size in figure.get_size_inches())
    width, taller = max(width, _SCALE_WIDTH), height + _SCALE_HEIGHT
    figure.set_size_inches(width, taller)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0.0, _SCALE_HEIGHT / taller, 1.0, height / taller))
    axis = figure.add_axes((1.05 / width, 0.1 / taller, 0.9 / width, 0.08 / taller))
    axis.imshow(np.linspace(-1, 1, 256)[None], cmap=SIGNED, aspect="auto")
    axis.set_axis_off()
    names = (f"{format_number(-limit)} against", -0.06, "right"), (f"for {format_number(limit)}", 1.06, "left")
    for text, x, side in names:
        axis.text(x, 0.5, text, transform=axis.transAxes, ha=side, va="center", fontsize=7, color=MUTED)
