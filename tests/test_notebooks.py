"""The notebooks run from top to bottom on the embedded model, and what they show in the repository is what they compute."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest

import analyses.views
from analyses.views import View
from lens_relevance import rulesets
from lens_relevance.attention_methods import METHODS
from tests.fixtures import STORIES

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 2_000_000
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# Paths of the machine on which it was executed, as they stand in warnings and tracebacks.
_LOCAL_PATH = re.compile(rf"{re.escape(str(FOLDER.parent))}|site-packages|/(?:home|root|tmp|Users)/|[A-Z]:\\")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def run(source: str, namespace: dict[str, Any]) -> tuple[str, Any]:
    """What a cell prints, and the value of its last expression (None where it ends otherwise)."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "<cell>", "exec"), namespace)
        value = None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), namespace)
    return printed.getvalue(), value


def same(shown: str, computed: str) -> None:
    """The same words, and numbers that are the same up to what another machine's rounding may change."""
    words = [" ".join(_NUMBER.sub("#", text).split()) for text in (shown, computed)]
    assert words[0] == words[1]
    numbers = [[float(number) for number in _NUMBER.findall(text)] for text in (shown, computed)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


def test_all_eight_are_here() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_", "5_", "6_", "7_", "8_"]


@each
def test_a_notebook_computes_what_it_shows(path: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    shown_values = 0
    for cell in code_cells(path):
        printed, value = run(cell.source, namespace)
        same("".join(output.text for output in cell.outputs if output.output_type == "stream"), printed)
        results = [output.data for output in cell.outputs if output.output_type == "execute_result"]
        assert len(results) == (value is not None), cell.source
        if value is None:
            continue
        shown_values += 1
        with pd.option_context("display.max_columns", 20, "display.width", 80):  # as in a notebook, whatever the terminal
            same(results[0]["text/plain"], repr(value))
        if isinstance(value, View):
            # A code host that takes no scripts shows the picture.
            assert results[0]["image/png"].startswith("iVBORw0KGgo") and value.png().startswith(b"\x89PNG")
    assert shown_values >= 3


OTHER_WORDS = (  # words that the tokenizer of a model of children's stories has, in place of the notebooks' own
    ("When Mary and John went to the store, John gave a drink to", "There was a girl named Lily. One day, Lily was very excited because"),
    ("When Mary and John went to the store, Mary gave a drink to", "There was a boy named Tim. One day, Tim was very excited because"),
    ('" Mary"', '" she"'),
    ('" John"', '" he"'),
    ("import ioi", "import pronoun"),
    ("ioi(", "pronoun("),
)


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the trained model ../shared/models/stories260k beside the checkout")
@each
def test_a_notebook_runs_on_another_architecture(path: Path) -> None:
    """A trained Llama with gated MLPs, RMSNorm and rotary positions in place of the embedded GPT-2."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in code_cells(path):
        source = cell.source.replace('load_model("embedded")', f"load_model({str(STORIES)!r})")
        for words, others in OTHER_WORDS:
            source = source.replace(words, others)
        run(re.sub(r"\b(n|steps|samples)=\d+", r"\1=4", source), namespace)  # what the figures are is another matter, so few pairs
    assert namespace["model"].cfg.d_vocab == 512 and namespace["model"].cfg.gated_mlp


@each
def test_a_notebook_can_be_shown_by_a_code_host(path: Path) -> None:
    assert path.stat().st_size < LARGEST
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        assert not _LOCAL_PATH.search(output.get("text", "") + output.get("data", {}).get("text/plain", ""))
    html = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert html and all("<script src" not in page for page in html)  # nothing is loaded from elsewhere


@each
def test_one_line_switches_to_gpt2(path: Path) -> None:
    first = code_cells(path)[0].source
    assert first.count('load_model("embedded")') == 1 and first.count('# model = load_model("gpt2")') == 1


def test_every_view_is_shown_somewhere() -> None:
    code = "".join(cell.source for path in NOTEBOOKS for cell in code_cells(path))
    views = [name for name in analyses.views.__all__ if name.endswith("_view") and name != "flow_view"]
    assert len(views) >= 10 and not [name for name in views if f"{name}(" not in code]
    assert ".show()" in code  # a flow graph's flow view


def test_links_between_the_pages_lead_somewhere() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in FOLDER.glob("*.md")}
    for path in NOTEBOOKS:
        texts[path] = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    targets = [(page, target) for page, text in texts.items() for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    assert targets
    for page, target in targets:
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_method_has_its_row() -> None:
    """A ruleset or a method of token relevance that is added must be placed here too."""
    page = (FOLDER.parent / "docs" / "guides" / "which_method.md").read_text(encoding="utf-8")
    for name in [*rulesets(), *METHODS]:
        assert f"\n| `{name}` |" in page, name
