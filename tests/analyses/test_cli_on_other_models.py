"""Every command on models that are no many-headed decoders: it does what it says, or says in one sentence why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from analyses.cli import app
from tests.analyses.tiny_folders import CLEAN, CORRUPT, KINDS

IMAGES = "this model reads images, and questions here are texts"
NO_HEAD = "this model has no head: its output is the last hidden state"
TWO_STACKS = "needs a model with one stack of blocks"
NO_LOGITS = "flows end at the logits of tokens (unembed)"
ITS_STREAM = "normalizes the residual stream itself"

PROMPT = ("--prompt", CLEAN)
COMMANDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "report": (("report", "--out", "OUT/page.html"), True),
    "report of a prompt": (("report", "--out", "OUT/page.html", *PROMPT), False),
    "explain": (("explain",), True),
    "explain a prompt": (("explain", "--rules", "attnlrp", *PROMPT), False),
    "explain by attention": (("explain", "--method", "rollout", *PROMPT), False),
    "graph": (("graph", "--out", "OUT/graph.json", *PROMPT), False),
    "rank heads": (("rank", "heads", "--ablate"), True),
    "rank neurons": (("rank", "neurons", "--method", "relp"), True),
    "compare": (("compare", "--methods", "deeplift,eap_ig,rollout", "--out", "OUT/table.html"), True),
    "circuit of nodes": (("circuit", "--methods", "deeplift,random"), True),
    "circuit of edges": (("circuit", "--methods", "deeplift,random", "--level", "edge"), True),
    "coverage": (("coverage",), False),
}
"""Arguments, and whether the command is given pairs."""

SERVED = {
    "report": "heads agree with activation patching to Pearson",
    "report of a prompt": "heads agree with activation patching to Pearson",
    "explain": "Where the number went",
    "explain a prompt": "Words, the prompt on its own",
    "explain by attention": "rollout (gradient)",
    "graph": "The strongest paths",
    "rank heads": "ablating the top",
    "rank neurons": "neurons by relp",
    "compare": "with activation patching",
    "circuit of nodes": "Circuits of nodes",
    "circuit of edges": "Circuits of edges",
    "coverage": "Rulesets on",
}
"""What stands in the output of a command that works."""

REFUSED: dict[str, dict[str, str]] = {
    "t5": dict.fromkeys(SERVED, TWO_STACKS),
    "vit": dict.fromkeys(SERVED, IMAGES),
    "bert": {"circuit of edges": ITS_STREAM},
    "bert_classifier": {"graph": NO_LOGITS, "circuit of edges": ITS_STREAM},
    "bert_encoder": dict.fromkeys(SERVED, NO_HEAD),
    "one_head": {},
}
"""Why a command refuses a model."""
for _kind, _works in (("t5", ("explain by attention", "coverage")), ("vit", ("coverage",)), ("bert_encoder", ("coverage",))):
    for _command in _works:
        del REFUSED[_kind][_command]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind of model, with a file of pairs for it."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(kind: str) -> Path:
        if not (root / kind).is_dir():
            (root / kind).mkdir()
            KINDS[kind](root / kind)
            answer, wrong = ("LABEL_0", "LABEL_1") if kind == "bert_classifier" else ("Mary", "John")
            rows = [dict(clean=CLEAN, corrupt=CORRUPT, answer=answer, wrong=wrong)] * 3
            pd.DataFrame(rows).to_csv(root / kind / "pairs.csv", index=False)
        return root / kind

    return folder


@pytest.mark.usefixtures("pictures_as_dots", "circuits_of_few_sizes")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_served_or_refused(
    kind: str, command: str, folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments, takes_pairs = COMMANDS[command]
    folder = folders(kind)
    pairs = ("--pairs", str(folder / "pairs.csv")) if takes_pairs else ()
    result = CliRunner().invoke(app, [*(part.replace("OUT", str(tmp_path)) for part in arguments), "--model", str(folder), *pairs])
    assert "Traceback" not in result.output and (result.exception is None or isinstance(result.exception, SystemExit)), result.exception
    reason = REFUSED[kind].get(command)
    if reason is None:
        assert result.exit_code == 0 and SERVED[command] in result.stdout, result.output
        assert "misses the difference" not in result.stderr  # pairs that are all alike are not one number for all
    else:
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith("Error:") and reason in result.stderr and result.stderr.count("\n") == 1
    if kind == "one_head" and command in ("report", "explain", "compare"):
        assert "undefined" in result.stdout and "nan" not in result.stdout.lower()


def test_a_task_that_asks_for_words_is_not_for_a_classifier(folders: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(app, ["rank", "--model", str(folders("bert_classifier"))])
    assert result.exit_code == 2 and "this model answers with classes ('LABEL_0', 'LABEL_1')" in result.stderr
