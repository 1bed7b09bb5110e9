"""Damaged and foreign files of every kind: one clear sentence each, nothing overwritten, nothing lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from analyses.cli import app
from analyses.graph import FlowGraph, flow_graph
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, RelevanceError, logit_diff, propagate
from tests.analyses.test_ranking import random_pairs
from tests.models import build_gpt2, build_with_words

WORDS = ["she", "he", "went", "home", "to", "the", "store", "Mary", "John"]
PROMPT = ("explain", "--prompt", "Mary went to")
PAIR = "clean,corrupt,answer,wrong\nMary went to the store,John went to the store, she, he\n"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def error_of(result: Result) -> str:
    """The one line that says what is wrong, beside warnings."""
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Warning: ")]
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert len(errors) == 1 and errors[0].startswith("Error: ") and len(errors[0]) < 700, result.stderr
    return errors[0]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    build_with_words(folder, WORDS)
    # With a second layer: build_with_words writes one.
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("h.0.", "h.1."): tensor.flip(0).clone() for name, tensor in tensors.items() if "h.0." in name}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    setting(n_layer=2)(folder / "config.json")
    return folder


def test_the_sound_model_is_served(sound: Path) -> None:
    assert run(*PROMPT, "--model", sound).exit_code == 0


Damage = Callable[[Path], object]


def truncated(share: float) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def holding(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def in_utf_16(path: Path) -> None:
    path.write_bytes(path.read_text().encode("utf-16"))


def setting(**values: object) -> Damage:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def without(*names: str) -> Damage:
    return lambda path: path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in names}))


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(3, 5)


ANY: dict[str, Damage] = {
    "empty": holding(b""),
    "truncated": truncated(0.5),
    "garbage": holding(bytes(range(256)) * 8),
    "text": holding(b"chapter 1\n"),
    "a folder": a_folder,
}
JSON: dict[str, Damage] = {"a list": holding(b"[1, 2]"), "a number": holding(b"7"), "utf-16": in_utf_16, "null": holding(b"null")}

MODEL: dict[str, tuple[str, Damage]] = {
    **{f"weights {name}": ("model.safetensors", damage) for name, damage in ANY.items()},
    "weights: header alone": ("model.safetensors", truncated(0.1)),
    "weights: a huge header": ("model.safetensors", holding(b"\xff" * 8 + b"{}")),
    "weights: no tensors": ("model.safetensors", weights(lambda tensors: tensors.clear())),
    "weights: one is missing": ("model.safetensors", weights(lambda tensors: tensors.pop("transformer.h.0.mlp.c_fc.weight"))),
    "weights: one of another shape": ("model.safetensors", weights(reshaped)),
    "weights: of another model": ("model.safetensors", lambda path: save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"})),
    **{f"config {name}": ("config.json", damage) for name, damage in {**ANY, **JSON}.items()},
    "config: more layers": ("config.json", setting(n_layer=3)),
    "config: fewer layers": ("config.json", setting(n_layer=1)),
    "config: no layers": ("config.json", setting(n_layer=0)),
    "config: another width": ("config.json", setting(n_embd=32)),
    "config: another vocabulary": ("config.json", setting(vocab_size=7)),
    "config: heads that do not divide the width": ("config.json", setting(n_head=3)),
    "config: no heads": ("config.json", setting(n_head=0)),
    "config: a word for a number": ("config.json", setting(n_layer="two")),
    "config: negative": ("config.json", setting(n_embd=-16)),
    "config: of another family": ("config.json", setting(model_type="llama", architectures=["LlamaForCausalLM"])),
    "config: of an unknown family": ("config.json", setting(model_type="unheard_of", architectures=["UnheardOf"])),
    "config: no family": ("config.json", without("model_type", "architectures")),
    **{f"tokenizer {name}": ("tokenizer.json", damage) for name, damage in {**ANY, **JSON}.items()},
    "tokenizer: other names": ("tokenizer.json", holding(b'{"version": "1.0"}')),
    **{f"tokenizer settings {name}": ("tokenizer_config.json", damage) for name, damage in {**ANY, **JSON}.items()},
}


@pytest.mark.parametrize("name", list(MODEL))
def test_folders_of_models(name: str, sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    file, damage = MODEL[name]
    damage(folder / file)
    before = contents(folder)
    message = error_of(run(*PROMPT, "--model", folder))
    assert str(folder) in message or file in message
    assert contents(folder) == before


GGUF: dict[str, Damage] = {
    **ANY,
    "the letters alone": holding(b"GGUF"),
    "the letters, then garbage": holding(b"GGUF" + bytes(range(256)) * 8),
    "a huge count": holding(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16),
}


@pytest.fixture(scope="module")
def sound_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    from tests.analyses.test_gguf import NORMAL, _llama, _write

    return _write(_llama(NORMAL), tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.mark.parametrize("name", list(GGUF))
def test_gguf_files(name: str, sound_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(sound_gguf, path)
    GGUF[name](path)
    before = contents(tmp_path)
    assert str(path) in error_of(run("explain", "--prompt", "ab", "--model", path))
    assert contents(tmp_path) == before


ROW = {"clean": "Mary went home", "corrupt": "John went home", "answer": " she", "wrong": " he"}
PAIRS: dict[str, tuple[str, Damage]] = {
    **{f"csv {name}": ("pairs.csv", damage) for name, damage in ANY.items() if name != "truncated"},
    **{f"jsonl {name}": ("pairs.jsonl", damage) for name, damage in ANY.items()},
    "csv: within a row": ("pairs.csv", truncated(0.7)),
    "csv: utf-16": ("pairs.csv", in_utf_16),
    "csv: latin-1": ("pairs.csv", holding(PAIR.replace("store", "caf\xe9").encode("latin-1"))),
    "csv: no rows": ("pairs.csv", holding(b"clean,corrupt,answer,wrong\n")),
    "csv: an open quote": ("pairs.csv", holding(PAIR.encode() + b'"Mary went,John,he,she\n')),
    "csv: more cells than columns": ("pairs.csv", holding(PAIR.encode() + b"a,b,c,d,e,f\n")),
    "csv: NUL": ("pairs.csv", holding(PAIR.replace("store", "st\0re").encode())),
    "csv: other columns": ("pairs.csv", holding(b"question,answer\na,b\n")),
    "csv: one column twice": ("pairs.csv", holding(b"clean,clean,corrupt,answer,wrong\na,b,c,d,e\n")),
    "jsonl: a list": ("pairs.jsonl", holding(json.dumps([ROW]).encode())),
    "jsonl: numbers": ("pairs.jsonl", holding(json.dumps(ROW | {"answer": 7}).encode())),
    "jsonl: null": ("pairs.jsonl", holding(json.dumps(ROW | {"answer": None}).encode())),
    "jsonl: lists": ("pairs.jsonl", holding(json.dumps(ROW | {"clean": ["Mary"]}).encode())),
    "jsonl: no object": ("pairs.jsonl", holding(b"7\n8\n")),
    "jsonl: utf-16": ("pairs.jsonl", in_utf_16),
    "jsonl: a key is missing in the second row": ("pairs.jsonl", holding((json.dumps(ROW) + '\n{"clean": "Mary"}\n').encode())),
    "of another ending": ("pairs.xlsx", holding(b"PK")),
    "not there": ("pairs.csv", lambda path: path.unlink()),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_files_of_pairs(name: str, sound: Path, tmp_path: Path) -> None:
    file, damage = PAIRS[name]
    path = tmp_path / file
    path.write_text(PAIR if path.suffix == ".csv" else "".join(json.dumps(ROW) + "\n" for _ in range(3)))
    damage(path)
    before = contents(tmp_path)
    assert file in error_of(run("rank", "heads", "--pairs", path, "--model", sound, "--out", tmp_path / "out.csv"))
    assert contents(tmp_path) == before


SAVED: dict[str, Damage] = {
    **ANY,
    "of another program": lambda path: save_file({"a": torch.ones(2)}, path),
    "its tensors alone": lambda path: save_file(load_file(path), path),
    "not there": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", list(SAVED))
@pytest.mark.parametrize("kind", ["pairs", "cache"])
def test_saved_pairs_and_caches(name: str, kind: str, tmp_path: Path) -> None:
    path, pairs = tmp_path / f"{kind}.safetensors", random_pairs()
    load: Callable[[Path], object] = PromptPairs.load if kind == "pairs" else RelevanceCache.load
    (pairs if kind == "pairs" else propagate(build_gpt2(), pairs.clean, logit_diff(1, 2), rules="gradient")).save(path)
    load(path)
    SAVED[name](path)
    before = contents(tmp_path)
    with pytest.raises(RelevanceError, match=path.name) as caught:
        load(path)
    assert "\n" not in str(caught.value) and contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["pairs", "cache"])
def test_saved_metadata(kind: str, tmp_path: Path) -> None:
    """Whole files whose descriptions were changed, or which lack a tensor."""
    from safetensors import safe_open

    path, pairs = tmp_path / f"{kind}.safetensors", random_pairs()
    load: Callable[[Path], object] = PromptPairs.load if kind == "pairs" else RelevanceCache.load
    (pairs if kind == "pairs" else propagate(build_gpt2(), pairs.clean, logit_diff(1, 2), rules="gradient", audit=True)).save(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors, n_tried = load_file(path), 0
    for key in [key for key in metadata if key != "format"]:
        for value in ("", "{", "7", "null", "[]", "{}", '{"kind": "unheard of"}', json.dumps({"unheard": 1})):
            if (key, value) in (("account", ""), ("dropped", "[]"), ("dropped", "{}")):
                continue
            save_file(tensors, path, metadata=metadata | {key: value})
            with pytest.raises(RelevanceError, match=path.name):
                load(path)
            n_tried += 1
    for key in tensors:
        if kind == "pairs" or "/" not in key:
            save_file({name: tensor for name, tensor in tensors.items() if name != key}, path, metadata=metadata)
            with pytest.raises(RelevanceError, match=path.name):
                load(path)
            n_tried += 1
    assert n_tried > 15


GRAPH: dict[str, Damage] = {
    **ANY,
    **JSON,
    "of another program": holding(b'{"format": "other"}'),
    "no edges": without("edges"),
    "no tokens": without("tokens"),
    "edges are no table": setting(edges=7),
    "columns of other lengths": setting(edges={"source": [1], "target": [1, 2]}),
    "edges lack a column": setting(edges={"source": []}),
    "not there": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def graph_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    pairs = random_pairs(1)
    return flow_graph(build_gpt2(), pairs.clean, logit_diff(1, 2), reference=pairs.corrupt).prune(top=20).to_json()


@pytest.mark.parametrize("name", list(GRAPH))
def test_graphs(name: str, graph_json: str, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(graph_json)
    FlowGraph.from_json(path)
    GRAPH[name](path)
    before = contents(tmp_path)
    with pytest.raises(RelevanceError, match="graph.json") as caught:
        FlowGraph.from_json(path)
    assert "\n" not in str(caught.value) and contents(tmp_path) == before


CHECKPOINT: dict[str, tuple[str, Damage]] = {
    **{f"part {name}": ("sums-0.safetensors", damage) for name, damage in ANY.items()},
    "part of another program": ("sums-0.safetensors", lambda path: save_file({"a": torch.ones(2)}, path)),
    "part without its checksum": ("sums-0.safetensors", lambda path: save_file(load_file(path), path)),
    **{f"run {name}": ("run.json", damage) for name, damage in {**ANY, **JSON}.items()},
    "run: of another program": ("run.json", holding(b'{"name": "npm"}')),
    "run: no numbers": ("run.json", without("numbers")),
    "run: numbers are words": ("run.json", setting(numbers={"dtype": "float32"})),
    "run: not there": ("run.json", lambda path: path.unlink()),
}


@pytest.fixture(scope="module")
def checkpoint(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of pairs and the checkpoint of their ranking, which a copy of the folder is as good for."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "pairs.csv").write_text(PAIR)
    assert run(*_ranking(sound, folder)).exit_code == 0
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("copy"), dirs_exist_ok=True)
    before = contents(copy)
    assert run(*_ranking(sound, copy)).exit_code == 0 and contents(copy) == before
    return folder


def _ranking(model: Path, folder: Path) -> tuple[str | Path, ...]:
    return ("rank", "heads", "--pairs", folder / "pairs.csv", "--model", model, "--checkpoint", folder / "run")


@pytest.mark.parametrize("name", list(CHECKPOINT))
def test_checkpoints(name: str, sound: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    command = _ranking(sound, tmp_path)
    file, damage = CHECKPOINT[name]
    damage(tmp_path / "run" / file)
    before = contents(tmp_path)
    message = error_of(run(*command, "--out", tmp_path / "out.csv"))
    assert str(tmp_path / "run") in message and any(word in message.lower() for word in ("delete", "name another", "name an empty"))
    assert contents(tmp_path) == before
