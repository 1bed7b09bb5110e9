"""What an installed package brings along, and that the suite checks shapes at run time as it claims."""

from __future__ import annotations

import contextlib
import importlib.metadata
import tomllib
import zipfile
from pathlib import Path

import jaxtyping
import pytest
import torch
from hatchling.builders.wheel import WheelBuilder
from packaging.specifiers import SpecifierSet

import lens_relevance
from analyses.tasks.fitting import tokenize_rows
from analyses.tasks.later_years import LaterYears
from lens_relevance.hooks.versions import TESTED
from lens_relevance.inputs.token_ids import positions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel of this checkout."""
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("wheel")), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_the_wheel_has_both_packages_typed_with_the_embedded_model(wheel: set[str]) -> None:
    for package in ("lens_relevance", "analyses"):
        assert f"{package}/py.typed" in wheel
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py") if "benchmarks" not in path.parts}
        assert modules <= wheel
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "training.json"):
        assert f"analyses/embedded/{name}" in wheel


def test_the_wheel_leaves_out_benchmarks_and_tests(wheel: set[str]) -> None:
    assert not [name for name in wheel if name.startswith(("analyses/benchmarks", "tests/", "notebooks/")) or "__pycache__" in name]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert importlib.metadata.version("lens-relevance") == lens_relevance.__version__


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {lens_relevance.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_workflows_call_the_script_of_the_continuous_integration() -> None:
    """On every version of Python that the package says it supports."""
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    versions = [line.split(":: ")[-1] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")]
    assert f"python: [{', '.join(repr(v).replace(chr(39), chr(34)) for v in versions)}]" in workflow
    assert "- run: .ci/run" in workflow and (ROOT / ".ci" / "run").exists()


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {requirement.split(">=")[0] for requirement in wanted} <= pinned


def test_every_pin_installs_on_the_oldest_python() -> None:
    """Not on the newest release of that version alone, which a system's own Python often is not."""
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].split(",")[0].removeprefix(">=") + ".0"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    seen = 0
    for name, version in pins.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # of an extra that is not installed
            found = importlib.metadata.metadata(name)
            if found["Version"] == version:
                seen += 1
                needed = found.get("Requires-Python", "")
                assert SpecifierSet(needed).contains(oldest), f"{name} {version} needs Python {needed}"
    assert seen > 50


def test_the_range_of_transformers_is_the_one_that_the_tests_have_seen() -> None:
    """The pin is one minor version wide, and it is the version that a call does not warn of."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pinned,) = (requirement for requirement in project["dependencies"] if requirement.startswith("transformers"))
    major, minor = TESTED["transformers"].split(".")
    assert pinned == f"transformers>={major}.{minor},<{major}.{int(minor) + 1}"
    assert importlib.metadata.version("transformers").startswith(f"{major}.{minor}.")


def test_shapes_and_types_are_checked_at_run_time() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        LaterYears(torch.zeros(3, dtype=torch.long), torch.zeros(2, 4, dtype=torch.bool))  # 3 years against 4
    with pytest.raises(jaxtyping.TypeCheckError):
        tokenize_rows("no model", ["text"])  # type: ignore[arg-type]
    with pytest.raises(jaxtyping.TypeCheckError):
        positions(-1, "no ids", None)  # type: ignore[arg-type]
