"""Text of others (prompts, tokens, file names) on its way to a terminal, a picture, a page or a table.

A prompt can hold characters that command instead of showing: escape sequences that repaint a terminal, U+202E that turns what follows
around, control characters that XML forbids. They are shown escaped, as Python writes them.
"""

from __future__ import annotations

import codecs
import sys
import unicodedata
from io import TextIOWrapper

# Control characters, halves of characters (which no file can hold), and separators that break lines.
_CATEGORIES = ("Cc", "Cs", "Zl", "Zp")
# Marks that change the direction of what follows (Unicode Standard Annex 9), and characters that XML does not allow.
_OTHERS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\ufffe\uffff")
_IN_ASCII = {
    **{"−": "-", "–": "-", "→": "->", "…": "...", "·": ".", "“": '"', "”": '"', "’": "'", "×": "x", "≥": ">=", "≤": "<="},
    **{"↵": "\\n", "⇥": "\\t", "␍": "\\r", "␣": "_"},
}
_HANDLER = "lens_relevance"


def visible(text: object, keep: str = "\n\t") -> str:
    """A text in which characters that would command, or are not allowed, are escaped: \\x1b, \\u202e.

    Args:
        keep: control characters that stay, where they are harmless.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(_escaped(sign) if sign not in keep and _commands(sign) else sign for sign in shown)


def _commands(sign: str) -> bool:
    return sign in _OTHERS or unicodedata.category(sign) in _CATEGORIES


def _escaped(sign: str) -> str:
    return sign.encode("unicode_escape").decode("ascii")


def let_any_text_be_printed() -> None:
    """Have standard output and error replace what their encoding lacks (ASCII terminals), so that printing cannot fail."""
    codecs.register_error(_HANDLER, _replaced)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=_HANDLER)


def _replaced(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end]
    return "".join(_IN_ASCII.get(sign, _escaped(sign)) for sign in missing), error.end
