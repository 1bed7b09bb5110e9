"""What a prompt holds is shown, and commands nothing: terminals, pages, pictures, graphs and tables; and any terminal can show it."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from analyses.cli import app
from analyses.output_files import table_csv
from analyses.views import Page, View, layer_view, scatter_view, token_view
from lens_relevance import RelevanceError, logit, propagate
from lens_relevance.shown_text import let_any_text_be_printed, visible
from tests.forked_processes import Forked
from tests.models import build_with_words

HOSTILE = ["\x1b", "\u202e", "\x07", "\x00", "\x9b", "\u2066", "\ufffe", "\x7f"]
PROMPT = f"Mary {HOSTILE[0]}[31m went{HOSTILE[1]} to{''.join(HOSTILE[2:])} the"


def commands(text: str) -> set[str]:
    """What a terminal or an XML reader would act on, or refuse."""
    return {sign for sign in text if sign != "\n" and (unicodedata.category(sign) in ("Cc", "Cs") or sign in "".join(HOSTILE))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    model = build_with_words(path, ["she", "he", "Mary", "John", "went", "to", "the", "[", "m", *HOSTILE])
    shown = model.tokenizer.decode(model.to_tokens(PROMPT)[0])
    assert all(sign in shown for sign in HOSTILE)  # the tokens themselves are hostile
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_texts_are_escaped_as_python_writes_them() -> None:
    assert visible("plain “text” é 日本 🙂 − →\n") == "plain “text” é 日本 🙂 − →\n"
    assert visible("a\x1b[31mb\u202ec\x07\r\ud800\u2028") == r"a\x1b[31mb\u202ec\x07\r\ud800\u2028"
    assert visible("a\tb\nc", keep="") == r"a\tb\nc"
    for sign in map(chr, range(0x110000)):
        if unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(sign) in BIDIRECTIONAL_CONTROLS:
            assert visible(sign, keep="") == sign.encode("unicode_escape").decode(), hex(ord(sign))


BIDIRECTIONAL_CONTROLS = ("LRE", "LRO", "RLE", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@pytest.mark.usefixtures("pictures_as_dots", "circuits_of_few_sizes")
@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "--rules", "attnlrp"),
        ("explain", "--method", "rollout"),
        ("graph", "--out", "OUT/graph"),
        ("report", "--out", "OUT/page.html"),
    ],
    ids=" ".join,
)
def test_commands_show_hostile_prompts(arguments: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    given = [argument.replace("OUT", str(tmp_path)) for argument in arguments]
    result = run(*given, "--model", folder, "--prompt", PROMPT, "--answer", " she", "--wrong", " he")
    assert result.exit_code == 0, result.output
    assert not commands(result.output)
    if arguments[0] in ("explain", "graph"):
        assert r"\x1b" in result.stdout and r"\u202e" in result.stdout and r"\x07" in result.stdout
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":  # data: read back as it was
            assert set(HOSTILE) <= set("".join(json.loads(text)["tokens"]))
            continue
        assert not commands(text) and r"\u202e" in text, path
        if path.suffix == ".graphml":
            ElementTree.parse(path)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_flow_pictures(ending: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / f"graph.{ending}"
    assert run("graph", "--model", folder, "--prompt", PROMPT, "--answer", " she", "--out", out).exit_code == 0
    if ending == "svg":
        ElementTree.parse(out)
        assert not commands(out.read_text(encoding="utf-8"))


def test_errors_are_escaped(folder: Path, tmp_path: Path) -> None:
    for arguments in (
        ("explain", "--model", str(tmp_path / "\x1b[31mx\u202e")),
        ("explain", "--model", str(folder), "--prompt", "Mary", "--answer", "\x1b]0;x\x07"),
        ("graph", "--model", str(folder), "--out", "\x1b.exe"),
        ("report", "--out", str(tmp_path / "\x9b" / "page.html")),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stderr.count("Error: ") == 1 and not commands(result.output), result.output
        assert re.search(r"\\x(1b|9b)", result.stderr)


def test_prompts_that_are_no_text(folder: Path) -> None:
    """Bytes on the command line that are not UTF-8 come as halves of characters."""
    result = run("explain", "--model", folder, "--prompt", "Mary \udcff")
    assert result.exit_code == 2 and "the prompt is no text" in result.stderr


def pictures() -> dict[str, View]:
    names = [*HOSTILE, "a", "b"]
    frame = pd.DataFrame({"x": np.arange(10.0), "y": np.arange(10.0) ** 2, "name": names})
    return {
        "tokens": token_view(names, np.arange(10.0) - 4, title=f"title {HOSTILE[0]}"),
        "layers": layer_view(names, np.arange(30.0).reshape(10, 3), title=f"title {HOSTILE[1]}"),
        "scatter": scatter_view(frame.rename(columns={"x": f"x{HOSTILE[0]}"}), f"x{HOSTILE[0]}", "y", label="name"),
    }


@pytest.mark.parametrize("name", ["tokens", "layers", "scatter"])
def test_pictures_are_well_formed(name: str) -> None:
    view = pictures()[name]
    text = view.svg().decode("utf-8")
    ElementTree.fromstring(text)
    assert not commands(text) and not commands(view.to_html())
    assert len(view.png()) > 1000


def test_pages_are_escaped() -> None:
    hostile = "".join(HOSTILE)
    page = Page(f"title {hostile}", f"subtitle {hostile}").heading(hostile).prose(f"{hostile} `{hostile}`").quote(f"{hostile}\n", hostile)
    page.tiles({hostile: (hostile, hostile)}).facts({hostile: hostile}).table(pd.DataFrame({hostile: [hostile]}), hostile)
    text = page.to_html()
    assert not commands(text) and text.count(r"\u202e") > 10


def test_tables_are_escaped() -> None:
    frame = pd.DataFrame({"=word": ["\x1b[31m", "a\nb", "\t=1", "\u202e", "plain"], "score": [-1.0, 2, 3, 4, 5]})
    text = table_csv(frame)
    assert not commands(text) and text.splitlines()[0] == "'=word,score"
    again = pd.read_csv(io.StringIO(text))
    assert again.iloc[:, 0].tolist() == [r"\x1b[31m", r"a\nb", r"\t=1", r"\u202e", "plain"]
    assert again["score"].tolist() == frame["score"].tolist()


def in_turn(lines: list[list[str]]) -> None:
    for line in lines:
        try:
            app(line)
        except SystemExit as end:
            print("ended with", end.code)


def test_terminals_that_lack_signs(folder: Path) -> None:
    """Each command in one process, with help and errors."""
    lines = [
        ["--help"],
        ["explain", "--help"],
        ["explain", "--model", str(folder), "--prompt", "Mary went", "--answer", " she", "--wrong", " he"],
        ["explain", "--model", str(folder), "--prompt", "Mary 日本 − “x” 🙂"],
        ["rank", "heads", "--n", "1"],
        ["explain", "--model", "/不/x"],
    ]
    child = Forked(in_turn, lines, environment={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"})
    out, errors = child.stdout.read(), child.stderr.read()
    assert child.wait() == 0 and "Traceback" not in errors, errors
    assert out.isascii() and errors.isascii()
    assert re.findall(r"ended with (\d|None)", out) == ["0", "0", "0", "0", "0", "2"]
    assert "heads by combined" in out and r"/\u4e0d/x" in errors and errors.count("Error:") == 1
    assert re.search(r"= [+-]\d+\.\d\d, on the mean embedding [+-]\d+\.\d\d; next word", out), out


def test_streams_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    for _ in range(2):
        let_any_text_be_printed()
    print("−0.5 “x” → 日 …")
    stream.flush()
    assert buffer.getvalue().decode().strip() == r'-0.5 "x" -> \u65e5 ...'


def test_the_engine_takes_any_text(folder: Path) -> None:
    model = build_with_words(folder, ["she"])
    assert propagate(model, "\x1b she", logit(0)).tokens().abs().max() > 0
    with pytest.raises(RelevanceError, match="no text"):
        propagate(model, ["she", "\ud800"], logit(0))
