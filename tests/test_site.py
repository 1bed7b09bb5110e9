"""The documentation site: it is built without a warning, needs nothing from elsewhere, and has every public name."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = (
    "lens_relevance",
    "lens_relevance.dictionaries",
    "lens_relevance.rules",
    "lens_relevance.sites",
    "analyses.circuits",
    "analyses.contexts",
    "analyses.describe",
    "analyses.dictionaries",
    "analyses.edges",
    "analyses.graph",
    "analyses.interventions",
    "analyses.methods",
    "analyses.patching",
    "analyses.perturbation",
    "analyses.report",
    "analyses.tasks",
    "analyses.views",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built offline; a warning is an error (`strict` in mkdocs.yml)."""
    pytest.importorskip("mkdocs", reason="needs the extra [docs]")
    of_this_run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_this_run = of_this_run.parent  # which all processes of a run share
    folder, finished = of_this_run / "site", of_this_run / "site-is-built"
    with FileLock(of_this_run / "site.lock"):
        if not finished.exists():
            command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
            environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
            built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
            assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
            finished.touch()
    return folder


def documented(module: str) -> list[tuple[str, object]]:
    """The functions and classes of a package's public face."""
    package = importlib.import_module(module)
    return [(name, value) for name in package.__all__ if callable(value := getattr(package, name)) and hasattr(value, "__module__")]


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_function_and_class_says_what_it_is(module: str) -> None:
    names = documented(module)
    assert names
    for name, value in names:
        if inspect.isclass(value) or inspect.isfunction(value):
            assert (inspect.getdoc(value) or "").strip(), f"{module}.{name} has no docstring"


def public_functions() -> dict[str, Callable[..., object]]:
    """Public functions, and the public methods that public classes define, by name."""
    found: dict[str, Callable[..., object]] = {}
    for module in PUBLIC:
        for name, value in documented(module):
            if inspect.isfunction(value):
                found[f"{module}.{name}"] = value
            elif inspect.isclass(value):
                own = {key: item for key, item in vars(value).items() if not key.startswith("_")}
                found |= {f"{module}.{name}.{key}": item for key, item in own.items() if inspect.isfunction(item)}
    return {name: value for name, value in found.items() if value.__name__ != "<lambda>"}


def test_what_public_functions_raise_is_in_their_docstrings() -> None:
    functions = public_functions()
    assert len(functions) > 250
    silent = [name for name, function in functions.items() if not inspect.getdoc(function)]
    assert not silent
    raising = {name: function for name, function in functions.items() if "raise RelevanceError(" in inspect.getsource(function)}
    assert len(raising) > 60
    assert not [name for name, function in raising.items() if "RelevanceError" not in (inspect.getdoc(function) or "")]


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    # whichever of the modules that export it the page calls it by
    anchors = {f"{package}...{name}" for package, name in re.findall(r'id="(\w+)\.(?:\w+\.)*(\w+)"', pages)}
    public = [(module, name, value) for module in PUBLIC for name, value in documented(module)]
    missing = [
        f"{module}.{name}"
        for module, name, value in public
        if (inspect.isclass(value) or inspect.isfunction(value)) and f"{module.split('.')[0]}...{name}" not in anchors
    ]
    assert not missing


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    names = {str(page.relative_to(site)) for page in pages}
    expected = {str(page.relative_to(ROOT / "docs").with_suffix(".html")) for page in (ROOT / "docs").rglob("*.md")}
    expected |= {f"notebooks/{path.stem}.html" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert expected <= names
    for page in pages:
        text = page.read_text(encoding="utf-8")
        outside = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//[^"]*"|<link[^>]+rel="stylesheet"[^>]+href="(?:https?:)?//[^"]*"', text
        )
        assert not outside, (page, outside)


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    text = (site / "derivation.html").read_text(encoding="utf-8")
    assert text.count("<math") > 50 and "$$" not in text and "\\frac" not in text
