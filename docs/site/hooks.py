"""What the site needs beside the pages: notebooks from their own folder, formulas as MathML, and links that lead within the site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", flags=re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+(?:\n[^$\n]+)?)\$", flags=re.DOTALL)


@event_priority(100)  # before the plugin that renders notebooks looks for them
def on_files(files: Files, config: Any) -> Files:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File(f"notebooks/{path.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links from a page to the notebooks, which the repository has beside `docs`, and to files that the site does not show."""
    if page.file.src_uri.startswith("reference/"):
        return markdown  # written for the site alone
    markdown = markdown.replace("](../../notebooks/", "](../notebooks/")
    markdown = re.sub(r"\[([^\]]+)\]\(\.\./\.\./((?:analyses|lens_relevance|tests)/[^)]*)\)", r"`\2`", markdown)
    parts = _CODE.split(markdown)
    return "".join(part if i % 2 else _FORMULA.sub(_mathml, part) for i, part in enumerate(parts))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Links from a notebook to pages: in the repository they lead through `docs`."""
    return re.sub(r'href="\.\./docs/([^"]*)\.md', r'href="../\1.html', html)


def _mathml(found: re.Match[str]) -> str:
    shown, within = found.groups()
    if shown:
        return f"\n\n{convert(shown.strip(), display='block')}\n\n"
    return f"<span>{convert(within)}</span>"  # at the start of a line the formula alone would be taken for a block
