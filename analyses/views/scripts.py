"""Scripts and styles that pictures need, as text that a page carries in itself.

CircuitsVis's own HTML asks the network at every display, or loads its script from a CDN. Here the script comes from the installed
package, once per page, gzipped in base64 (a third of its size); `views.js` inflates it in the browser.
"""

from __future__ import annotations

import base64
import gzip
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Any

CIRCUITSVIS = "circuitsvis"
FLOW = "flow"
_FLOW_FILES = ("flow_layout.js", "flow_panel.js", "flow_files.js", "flow_edges.js", "flow_nodes.js", "flow.js")

# The cell whose output carries CircuitsVis's script in this process ("" where the front end does not tell), None before the first.
_carrying_cell: str | None = None


def page_scripts(names: Iterable[str]) -> tuple[str, str]:
    """What a page needs besides its views: `(head, end_of_body)`. CircuitsVis goes last: the page can be read before it is there."""
    wanted = set(names)
    head = _style() + _core() + (_flow() if FLOW in wanted else "")
    return head, _circuitsvis() if CIRCUITSVIS in wanted else ""


def notebook_scripts(names: Iterable[str]) -> str:
    """What one notebook output needs. CircuitsVis's script (0.5 MB) goes with the first output only, and again with that cell's next run.

    A notebook whose first picture was deleted shows its other pictures as static images until a cell is run again.
    """
    global _carrying_cell
    wanted = set(names)
    scripts = _style() + _core() + (_flow() if FLOW in wanted else "")
    if CIRCUITSVIS in wanted:
        cell = _notebook_cell()
        # In Colab every output is a page of its own.
        if _carrying_cell is None or (cell and cell == _carrying_cell) or "google.colab" in sys.modules:
            _carrying_cell = cell
            scripts += _circuitsvis()
    return scripts


def _notebook_cell() -> str:
    """The front end's name of the running cell, "" outside a notebook or where the front end does not tell."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    parent: dict[str, Any] = getattr(shell, "get_parent", dict)() or {}
    return str(parent.get("metadata", {}).get("cellId", ""))


@cache
def _style() -> str:
    return f"<style>{_text('views.css')}</style>"


@cache
def _core() -> str:
    return f"<script>{_text('views.js')}</script>"


@cache
def _flow() -> str:
    return "".join(f"<script>{_text(name)}</script>" for name in _FLOW_FILES)


@cache
def _circuitsvis() -> str:
    source = files("circuitsvis").joinpath("dist", "cdn", "iife.js")
    if not source.is_file():
        raise FileNotFoundError("the installed circuitsvis lacks its script dist/cdn/iife.js: pip install --force-reinstall circuitsvis")
    text = source.read_text(encoding="utf-8").partition("//# sourceMappingURL=")[0]  # the browser would ask for the map
    packed = base64.b64encode(gzip.compress(_our_colours(text).encode(), compresslevel=9, mtime=0)).decode("ascii")
    return f'<script>lensRelevance.installCircuitsVis("{packed}")</script>'


def _our_colours(script: str) -> str:
    """CircuitsVis's multi-token view takes no colours: exchange its two defaults, so that blue and red are the same in every picture.

    Where a release no longer has them in this form its own red and blue stay.
    """
    from analyses.views.palette import NEGATIVE, POSITIVE

    return re.sub(r'="red",([\w$]+)="blue"\)', rf'="{NEGATIVE}",\1="{POSITIVE}")', script, count=1)


def _text(name: str) -> str:
    return files("analyses.views").joinpath(name).read_text(encoding="utf-8")
