"""Where results go is checked before the work; nothing of others is overwritten, and what is written is whole or as it was."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from analyses.cli import app
from analyses.models import loading
from analyses.output_files import OutputFile, table_csv
from lens_relevance import RelevanceError, whole_files
from lens_relevance.whole_files import write_whole

COMMANDS: dict[str, tuple[str, ...]] = {
    "report.html": ("report", "--n", "2"),
    "graph.html": ("graph", "--top", "20"),
    "graph.json": ("graph", "--top", "20"),
    "graph.graphml": ("graph", "--top", "20"),
    "graph.svg": ("graph", "--top", "20"),
    "graph.png": ("graph", "--top", "20"),
    "rank.csv": ("rank", "heads", "--n", "2"),
    "neurons.csv": ("rank", "neurons", "--n", "2"),
    "compare.html": ("compare", "--n", "2", "--methods", "gradient", "--components", "heads"),
    "compare.csv": ("compare", "--n", "2", "--methods", "gradient", "--components", "heads"),
    "circuit.csv": ("circuit", "--n", "4", "--methods", "gradient"),
    "coverage.csv": ("coverage",),
}


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def error_of(result: Result) -> str:
    """The one line that says what is wrong."""
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and result.exception.__class__ is SystemExit, (result.output, result.exception)
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    return lines[0]


def stop_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of a command begins with the model."""

    def load_model(*_: object, **__: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(loading, "load_model", load_model)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_before_work(monkeypatch)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_where_nothing_can_be_written_no_work_is_done(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    for out, words in {
        tmp_path / "missing" / name: "there is no folder",
        tmp_path / name: "it is a folder",
        tmp_path / ("x" * 300 + name): "File name too long",
        Path("/proc") / name: "cannot be written",
    }.items():
        assert words in error_of(run(*COMMANDS[name], "--out", out))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.parametrize("content", [b"chapter 1", b"\x00\xff", b"layer,name\n1,2\n", b"<html>lens_relevance is a package</html>"])
def test_what_others_wrote_is_not_overwritten(name: str, content: bytes, tmp_path: Path) -> None:
    out = tmp_path / name
    out.write_bytes(content)
    assert "was not written by lens_relevance; name another file, or add --force" in error_of(run(*COMMANDS[name], "--out", out))
    assert out.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", list(COMMANDS))
@pytest.mark.usefixtures("pictures_as_dots", "circuits_of_few_sizes")
def test_what_this_package_wrote_is_overwritten(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second time, over an empty file, and with --force over anything; through a link, and permissions stay."""
    out, link = tmp_path / name, tmp_path / f"link-{name}"
    out.touch(mode=0o640)
    link.symlink_to(out)
    assert run(*COMMANDS[name], "--out", link).exit_code == 0
    assert link.is_symlink() and stat.S_IMODE(out.stat().st_mode) == 0o640 and out.stat().st_size > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, link.name])
    stop_before_work(monkeypatch)
    assert str(run(*COMMANDS[name], "--out", out).exception) == "the work has begun"
    out.write_bytes(b"chapter 1")
    assert str(run(*COMMANDS[name], "--out", out, "--force").exception) == "the work has begun"


def full(path: Path) -> None:
    """A writer on a disk that is full after the first bytes."""
    path.write_bytes(b"half of")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(path: Path) -> None:
    path.write_bytes(b"half of")
    raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, b"what was there"])
@pytest.mark.parametrize(("writer", "error"), [(full, RelevanceError), (interrupted, KeyboardInterrupt)])
def test_a_file_is_whole_or_as_it_was(
    before: bytes | None, writer: Callable[[Path], None], error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(error, match="No space left on device. What was there before is as it was" if error is RelevanceError else None):
        write_whole(path, writer)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if before is None else [before])


@pytest.mark.parametrize("name", ["rank.csv", "compare.html", "graph.json"])
@pytest.mark.usefixtures("pictures_as_dots")
def test_on_a_disk_that_is_full_the_table_is_printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up while the work is done."""

    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files.os, "replace", replace)
    result = run(*COMMANDS[name], "--out", tmp_path / name)
    assert f"{tmp_path / name} cannot be written: No space left on device" in error_of(result)
    assert len(result.stdout.splitlines()) >= 5
    assert not list(tmp_path.iterdir())


def test_what_somebody_wrote_during_the_work_is_not_overwritten(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "table.csv", columns=["layer"])
    (tmp_path / "table.csv").write_text("theirs")
    with pytest.raises(RelevanceError, match="was not written by lens_relevance"):
        file.write_table(pd.DataFrame({"layer": [1]}))
    assert (tmp_path / "table.csv").read_text() == "theirs"


def test_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    frame = pd.DataFrame({"layer": [1]})
    OutputFile("/dev/null").write_table(frame)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    if Path("/dev/full").exists():
        with pytest.raises(RelevanceError, match="/dev/full cannot be written: No space left on device"):
            OutputFile("/dev/full").write_table(frame)


def test_saved_pairs_caches_and_pictures_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analyses.views import Page, head_heatmap_view
    from lens_relevance import logit, propagate
    from tests.analyses.test_ranking import random_pairs
    from tests.models import build_gpt2

    model, pairs = build_gpt2(), random_pairs()
    cache = propagate(model, pairs.clean, logit(3), rules="gradient")
    view = head_heatmap_view(torch.eye(2))
    savers = {"pairs": pairs.save, "cache": cache.save, "page.html": Page("t").save, "view.svg": view.save, "view.png": view.save}
    monkeypatch.setattr(whole_files.os, "replace", lambda *_: full(tmp_path / "other"))
    (tmp_path / "other").touch()
    for name, save in savers.items():
        (tmp_path / name).write_bytes(b"what was there")
        with pytest.raises(RelevanceError, match="No space left"):
            save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*savers, "other"])


def test_formulas_are_shown_and_not_computed() -> None:
    frame = pd.DataFrame({"word": ["=1+1", "+1", "-1", "@SUM(A1)", "plain", "", None], "score": [-1.5, 1e-17, 0.1, 2, 3, 4, 5]})
    text = table_csv(frame)
    assert text.splitlines()[1:6] == ["'=1+1,-1.5", "'+1,1e-17", "'-1,0.1", "'@SUM(A1),2.0", "plain,3.0"]
