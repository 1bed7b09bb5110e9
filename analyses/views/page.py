"""`View`: one picture, interactive and static. `Page`: views, tables and prose joined into one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analyses.output_files import MARK
from analyses.views import scripts
from analyses.views.markup import escape, facts_html, inline_markup, script_json, table_html
from analyses.views.palette import figure_bytes, small_png, styled
from lens_relevance.errors import RelevanceError
from lens_relevance.whole_files import write_whole

# The browser itself then refuses every request, whatever a token may hold.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


class View:
    """One picture: interactive HTML where scripts run, and a static twin of it (PNG, SVG) everywhere else.

    Args:
        title: one line of plain text, above the picture; also the static picture's alternative text.
        draw: makes the static picture.
        note: HTML under the picture: the numbers it was drawn from.
        component: what `views.js` mounts in the body's place, with `props` (JSON).
        script: the script that brings the component (`scripts.CIRCUITSVIS`, `scripts.FLOW`), if it is not `views.js` itself.
    """

    def __init__(
        self,
        title: str,
        draw: Callable[[], Figure],
        *,
        note: str = "",
        component: str | None = None,
        props: Mapping[str, Any] | None = None,
        script: str | None = None,
    ) -> None:
        self.title = title
        self.scripts = (script,) if script else ()
        self._draw = draw
        self._note = note
        self._component = component
        self._props = script_json(dict(props or {}))

    @cached_property
    def html(self) -> str:
        """The picture as an HTML fragment for a page that has the scripts (`Page`, `to_html`); the static picture where it has not."""
        body = self._image()
        name = hashlib.sha256(f"{self._component}{self._props}{body}{self._note}".encode()).hexdigest()[:12]
        title = escape(self.title)
        figure = (
            f'<figure class="lr-view" data-lr-view="{name}" aria-label="{title}">{_caption(self.title)}'
            f'<div class="lr-body">{body}</div>{self._note}</figure>'
        )
        if self._component is None:
            return figure
        return f'{figure}<script>lensRelevance.show("{name}","{self._component}",{self._props})</script>'

    def _image(self) -> str:
        return f'<img class="lr-static" width="{self._width}" alt="{escape(self.title)}" src="data:image/png;base64,{self._embedded_png}">'

    @property
    def _width(self) -> int:
        return round(96 * self._figure.get_figwidth())  # a CSS pixel is 1/96 inch

    @cached_property
    def _embedded_png(self) -> str:
        return base64.b64encode(small_png(self._figure)).decode("ascii")

    @cached_property
    def _figure(self) -> Figure:
        with styled():
            return self._draw()

    def figure(self) -> Figure:
        """The static picture as a matplotlib figure, to be changed and saved for a paper."""
        with styled():
            return self._draw()

    def png(self, dpi: int = 160) -> bytes:
        """The static picture as PNG."""
        return figure_bytes(self._figure, "png", dpi)

    def svg(self) -> bytes:
        """The static picture as SVG."""
        return figure_bytes(self._figure, "svg")

    def to_html(self) -> str:
        """A self-contained page with this picture alone."""
        return Page(self.title).view(self).to_html()

    def save(self, path: str | Path) -> Path:
        """Write the picture as `.html`, `.png` or `.svg`, by the path's ending.

        Raises:
            RelevanceError: another ending.
        """
        path = Path(path)
        content = {".html": lambda: self.to_html().encode(), ".png": self.png, ".svg": self.svg}.get(path.suffix.lower())
        if content is None:
            raise RelevanceError(f"cannot save a picture as {path.suffix or 'a file without an ending'!r}: use .html, .png or .svg")
        data = content()
        write_whole(path, lambda beside: beside.write_bytes(data))
        return path

    def _repr_html_(self) -> str:
        return scripts.notebook_scripts(self.scripts) + self.html

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
        """Both forms and their metadata: a notebook shows the interactive one, a code host that takes no scripts the PNG."""
        forms = {"text/html": self._repr_html_(), "image/png": self._embedded_png, "text/plain": repr(self)}
        return forms, {"image/png": {"width": self._width}}

    def __repr__(self) -> str:
        return f"View({self.title!r})"


def _caption(title: str) -> str:
    return f'<figcaption class="lr-title">{escape(title)}</figcaption>'


def _marked(text: str, against: str) -> str:
    """Escaped text in which words that `against` does not have at their place are marked."""
    words, others = (re.split(r"(\s+)", one) for one in (text, against))
    same = [block for block in SequenceMatcher(None, others, words, autojunk=False).get_matching_blocks() if block.size]
    kept = {block.b + i for block in same for i in range(block.size)}
    return "".join(escape(word) if i in kept or word.isspace() else f"<mark>{escape(word)}</mark>" for i, word in enumerate(words) if word)


class Page:
    """One self-contained HTML page, written from top to bottom; every method returns the page.

    All text is escaped. `prose`, captions and the subtitle render `code` and **bold**; give text from prompts to `quote`, which renders
    nothing.

        Page("IOI").prose("What `L9H9` does.").view(token_view(tokens, relevance)).save("ioi.html")
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self._subtitle = subtitle
        self._parts: list[str] = []
        self._sections: list[tuple[str, str]] = []
        self._scripts: list[str] = []

    def heading(self, text: str, level: int = 2) -> Page:
        """A heading of level 2 or 3. Those of level 2 become the page's contents.

        Raises:
            RelevanceError: another level.
        """
        if level not in (2, 3):
            raise RelevanceError(f"a page has headings of level 2 and 3, not {level}; the title is level 1")
        anchor = f"{re.sub('[^a-z0-9]+', '-', text.lower()).strip('-')}-{len(self._parts)}"
        if level == 2:
            self._sections.append((anchor, text))
        self._parts.append(f'<h{level} id="{anchor}">{escape(text)}</h{level}>')
        return self

    def prose(self, text: str) -> Page:
        """Paragraphs, parted by empty lines."""
        self._parts += [f"<p>{inline_markup(paragraph.strip())}</p>" for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
        return self

    def quote(self, text: str, label: str = "", against: str = "") -> Page:
        """A prompt or other text shown exactly as it is, line breaks too; words in which it differs from `against` are marked."""
        name = f"<figcaption>{escape(label)}</figcaption>" if label else ""
        shown = _marked(text, against) if against else escape(text)
        self._parts.append(f'<figure class="lr-quote">{name}<blockquote>{shown}</blockquote></figure>')
        return self

    def tiles(self, tiles: Mapping[str, tuple[str, str]]) -> Page:
        """The main results, to be taken in at a glance: name -> (result, a line that explains it)."""
        cells = "".join(
            f'<div class="lr-tile"><dt>{escape(name)}</dt><dd><strong>{escape(result)}</strong><span>{escape(line)}</span></dd></div>'
            for name, (result, line) in tiles.items()
        )
        self._parts.append(f'<dl class="lr-tiles">{cells}</dl>')
        return self

    def facts(self, facts: Mapping[str, object]) -> Page:
        """Names and values in two columns: settings, versions, totals."""
        self._parts.append(facts_html(facts))
        return self

    def table(self, frame: pd.DataFrame, caption: str = "", bars: Sequence[str] = ()) -> Page:
        """A DataFrame (see `markup.table_html`); `bars` names columns of signed numbers that also get a bar."""
        self._parts.append(table_html(frame, caption, bars))
        return self

    def view(self, view: View, caption: str = "") -> Page:
        """A picture under its title (unless the page has the same one), with a caption."""
        note = f'<p class="lr-caption">{inline_markup(caption)}</p>' if caption else ""
        html = view.html.replace(_caption(view.title), "", 1) if view.title == self.title else view.html
        self._parts.append(f'<section class="lr-block">{html}{note}</section>')
        self._scripts += view.scripts
        return self

    def details(self, summary: str, frame: pd.DataFrame) -> Page:
        """A table that is folded away until it is asked for."""
        self._parts.append(f"<details><summary>{inline_markup(summary)}</summary>{table_html(frame)}</details>")
        return self

    def to_html(self) -> str:
        """The page as one string. No request leaves it."""
        head, tail = scripts.page_scripts(self._scripts)
        subtitle = f'<p class="lr-subtitle">{inline_markup(self._subtitle)}</p>' if self._subtitle else ""
        links = "".join(f'<a href="#{anchor}">{escape(text)}</a>' for anchor, text in self._sections)
        contents = f'<nav aria-label="Contents">{links}</nav>' if len(self._sections) > 2 else ""
        title = escape(self.title)
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f'<meta name="generator" content="{MARK}">'
            '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
            f"<title>{title}</title>{head}</head>"
            f'<body class="lr-page"><header><h1>{title}</h1>{subtitle}{contents}</header>'
            f"<main>{''.join(self._parts)}</main>{tail}</body></html>"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to `path` (UTF-8)."""
        path = Path(path)
        html = self.to_html()
        write_whole(path, lambda beside: beside.write_text(html, encoding="utf-8"))
        return path
