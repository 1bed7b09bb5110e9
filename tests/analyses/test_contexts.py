"""Contexts by relevance: against a loop over all windows, whatever the batches; interrupted runs; files. Shared runs: test_streaming.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

from analyses.cli import app
from analyses.contexts import Atlas, build_atlas, contexts_page
from analyses.contexts import build as build_module
from analyses.contexts.corpus import in_batches, texts_of, windows
from analyses.contexts.extremes import NOTHING, Extreme
from lens_relevance import RelevanceError, propagate

NAMES = ("Mary", "John", "Tom", "Anna", "James")
TEXTS = [
    *(f"When {a} and {b} went to the store, {b} gave a drink to" for a in NAMES for b in NAMES if a != b),
    *(f"{a} and {b} went to the store" for a in NAMES for b in NAMES if a < b),
    "Mary",
    "John gave a drink to Mary and Mary gave a drink to John and John went to the store and Mary went to the store",
]


@pytest.fixture(scope="module")
def atlas(_embedded: TransformerBridge) -> Atlas:
    return build_atlas(_embedded, TEXTS, ["neurons", "heads"], layers=[1, 2], k=3, window=16)


@pytest.fixture(scope="module")
def by_hand(_embedded: TransformerBridge) -> list[dict[str, Any]]:
    """Relevance and activation of every neuron and head of two layers, window by window, one run each."""
    found, size = [], 16
    for text in TEXTS:
        ids = _embedded.to_tokens(text)[0]
        bos, rest = ids[:1], ids[1:]
        for start in range(0, len(rest), size - 1):
            piece = torch.cat([bos, rest[start : start + size - 1]])
            cache = propagate(_embedded, piece[None], rules="attnlrp", names_filter=["blocks.1.mlp.hook_post", "blocks.2.attn.hook_z"])
            neurons, z = cache["blocks.1.mlp.hook_post"][0], cache["blocks.2.attn.hook_z"][0].sum(-1)
            values = cache.activations["blocks.1.mlp.hook_post"][0], cache.activations["blocks.2.attn.hook_z"][0].norm(dim=-1)
            predicted = _embedded(piece[None])[0, -1].argmax()
            found.append({"tokens": piece, "relevance": (neurons, z), "activation": values, "predicted": int(predicted)})
    return found


@pytest.mark.parametrize(("unit", "which", "index"), [("L1N5", 0, 5), ("L1N77", 0, 77), ("L2H1", 1, 1)])
def test_the_best_windows_are_those_of_a_loop(
    embedded: TransformerBridge, by_hand: list[dict[str, Any]], atlas: Atlas, unit: str, which: int, index: int
) -> None:
    found = by_hand
    assert atlas.info["windows"] == len(found) and atlas.info["tokens"] == sum(len(one["tokens"]) for one in found)
    for by in ("relevance", "activation"):
        for lowest in (False, True):
            scores = []
            for number, one in enumerate(found):
                column = one[by][which][:, index]
                score = column.sum() if by == "relevance" else column.min() if lowest else column.max()
                at = column.abs().argmax() if by == "relevance" else column.argmin() if lowest else column.argmax()
                scores.append((float(score) * (1 if lowest else -1), number, int(at)))
            table = atlas.contexts(unit, by=by, lowest=lowest)
            assert len(table) == 3
            for row, (score, number, at) in zip(table.itertuples(), sorted(scores), strict=False):
                assert getattr(row, by) == pytest.approx(score * (1 if lowest else -1), rel=1e-4, abs=1e-5)
                one = found[row.window]
                if row.window == number:
                    assert row.position == at
                assert torch.equal(atlas.window(row.window), one["tokens"])
                decode = embedded.tokenizer.decode  # this one leaves out the space before a token that stands alone
                assert row.predicted.lstrip() == decode([one["predicted"]])
                assert row.context.count("«") == 1 and row.token.lstrip() == decode([int(one["tokens"][row.position])])
                assert row.context.replace("«", "").replace("»", "") == decode(one["tokens"])
    relevance = atlas.contexts(unit)["relevance"]
    assert relevance.is_monotonic_decreasing and relevance.iloc[0] > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=1, max_size=20),
    st.integers(1, 5),
    st.booleans(),
)
def test_extremes_are_the_first_of_a_stable_sort(k: int, scores: list[list[int]], parts: int, highest: bool) -> None:
    """In whatever parts and order the windows come, and put together from several: ties go to the lower number."""
    table = torch.tensor(scores, dtype=torch.float32).T  # [unit, window]
    sign, n = 1 if highest else -1, table.shape[1]
    whole = Extreme.empty(2, k, sign)
    for part in torch.randperm(n).tensor_split(parts):
        one = Extreme.empty(2, k, sign)
        numbers = part.expand(2, -1)
        one.add(table[:, part], 2 * table[:, part], part.expand(2, -1).int() + 1, numbers)
        whole.merge(one.state())
    for unit in range(2):
        expected = sorted(range(n), key=lambda i: (-sign * float(table[unit, i]), i))[:k]
        assert whole.window[unit].tolist() == expected + [NOTHING] * (k - len(expected))
        kept = table[unit, expected]
        assert torch.equal(whole.score[unit, : len(expected)], kept) and torch.equal(whole.other[unit, : len(expected)], 2 * kept)
        assert whole.position[unit, : len(expected)].tolist() == [i + 1 for i in expected]


def same(a: Atlas, b: Atlas) -> bool:
    equal = all(torch.equal(a.rankings[name][key], b.rankings[name][key]) for name in a.rankings for key in a.rankings[name])
    return equal and all(torch.equal(getattr(a, key), getattr(b, key)) for key in ("numbers", "tokens", "lengths", "predicted"))


def test_a_file_holds_it_all(atlas: Atlas, tmp_path: Path) -> None:
    atlas.save(tmp_path / "atlas.safetensors")
    again = Atlas.load(tmp_path / "atlas.safetensors")
    assert same(atlas, again) and again.strings == atlas.strings and again.info == atlas.info and again.units == atlas.units
    assert again.contexts("L2H3").equals(atlas.contexts("L2H3")) and again.names()[:1] == ["L1N0"] and again.names()[-1] == "L2H3"
    whole = (tmp_path / "atlas.safetensors").read_bytes()
    for _ in range(8):  # the same atlas is the same file
        again.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == whole
    for damaged in (whole[: len(whole) // 2], b"no atlas", b""):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(RelevanceError, match="cannot be read as an atlas"):
            Atlas.load(tmp_path / "damaged")


def test_an_interrupted_run_goes_on_bit_by_bit(embedded: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"components": ["neurons"], "layers": [1], "k": 4, "window": 8}
    monkeypatch.setattr(build_module, "_TOKENS_PER_PASS", 16)
    monkeypatch.setattr(build_module, "_SAVED_EVERY", 0.0)
    expected = build_atlas(embedded, TEXTS, **arguments)
    real, count = build_module.propagate, 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_module, "propagate", killed)
        build_atlas(embedded, TEXTS, **arguments, checkpoint=tmp_path / "run")
    count = -1000
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "propagate", killed)
        found = build_atlas(embedded, TEXTS, **arguments, checkpoint=tmp_path / "run")
    assert same(found, expected) and found.info == expected.info
    total = 1000 + count
    assert total == sum(1 for _ in in_batches(windows(embedded, texts_of(TEXTS), 8), 2)) - 8, "what was done is not done again"
    with pytest.raises(RelevanceError, match="checkpoint of another run"):
        build_atlas(embedded, TEXTS[1:], **arguments, checkpoint=tmp_path / "run")


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_file_is_read_as_its_texts(ending: str, tmp_path: Path) -> None:
    path, texts = tmp_path / f"corpus{ending}", ['Mary, and "John"', "été = 1", "Tom"]
    if ending == ".txt":
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    elif ending == ".jsonl":
        path.write_text("\n".join(json.dumps({"body": text, "n": 1}) for text in texts), encoding="utf-8")
    elif ending == ".csv":
        pd.DataFrame({"n": 1, "body": texts}).to_csv(path, index=False)
    else:
        pytest.importorskip("pyarrow", reason="parquet files are read with pyarrow")
        pd.DataFrame({"n": 1, "body": texts}).to_parquet(path)
    assert list(texts_of(path, "body")) == texts


def test_parquet_without_an_engine_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    with pytest.raises(RelevanceError, match="read with pyarrow, which is not installed: pip install pyarrow"):
        list(texts_of(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.parquet", "no parquet", "cannot be read as a corpus|pip install pyarrow"),
        ("a.doc", "", "a corpus is read from .txt, .jsonl, .csv, .parquet"),
        ("a.jsonl", "{", "cannot be read as a corpus"),
        ("a.jsonl", '{"words": "a"}', "cannot be read as a corpus"),
        ("a.jsonl", '{"text": 1}', "row 0 holds 1 as 'text', which is no text"),
        ("a.csv", "a,b\n1,2\n", "cannot be read as a corpus"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as a corpus"),
        ("a.txt", "\n", "holds no text of two tokens"),
    ],
)
def test_files_that_are_no_corpus(embedded: TransformerBridge, tmp_path: Path, name: str, content: Any, said: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RelevanceError, match=said):
        build_atlas(embedded, tmp_path / name, layers=[0], k=1)


def test_bad_arguments(embedded: TransformerBridge, atlas: Atlas, gpt2: TransformerBridge) -> None:
    for arguments, said in (
        ({"components": ["resid"]}, "an atlas is of neurons and heads"),
        ({"components": []}, "an atlas is of neurons and heads"),
        ({"layers": [9]}, "layer 9 is out of range"),
        ({"k": 0}, "at least 1"),
        ({"rules": "deeplift"}, "compares two runs"),
        ({"window": 1}, "a window has 2 to"),
    ):
        with pytest.raises(RelevanceError, match=said):
            build_atlas(embedded, TEXTS, **arguments)  # type: ignore[arg-type]
    with pytest.raises(RelevanceError, match="no tokenizer"):
        build_atlas(gpt2, TEXTS)
    with pytest.raises(RelevanceError, match="does not hold L3N0; it holds neurons of layer 1"):
        atlas.contexts("L3N0")


def test_a_page_of_contexts(embedded: TransformerBridge, atlas: Atlas) -> None:
    page = contexts_page(embedded, atlas, ["L1N5", "L2H1"], shown=2).to_html()
    best = atlas.contexts("L2H1").iloc[0]
    assert "Most relevant" in page and "predicts " in page and best["token"].strip() in page
    weight = embedded.original_model.transformer.h[2].attn.c_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight *= 2
        try:
            with pytest.raises(RelevanceError, match="of another model"):
                contexts_page(embedded, atlas, ["L2H1"])
        finally:
            weight.copy_(kept)


def test_the_command_makes_an_atlas_and_shows_units(tmp_path: Path) -> None:
    corpus, out = tmp_path / "corpus.txt", tmp_path / "atlas.safetensors"
    corpus.write_text("\n".join(TEXTS), encoding="utf-8")
    options = ["contexts", "--text", str(corpus), "--layers", "1,2", "--k", "2", "--out", str(out)]
    made = CliRunner().invoke(app, [*options, "--unit", "L1N5", "--page", str(tmp_path / "page.html")])
    assert made.exit_code == 0, made.output
    assert "32 windows" in made.output and "L1N5" in made.output
    assert "Most relevant" in (tmp_path / "page.html").read_text()
    assert Atlas.load(out).units == {("neurons", 1): 256, ("neurons", 2): 256}
    shown = CliRunner().invoke(app, ["contexts", "--atlas", str(out), "--unit", "L2N9"])
    assert shown.exit_code == 0 and "L2N9" in shown.output
    for wrong in (
        ["contexts"],
        ["contexts", "--atlas", str(out)],
        ["contexts", "--text", str(corpus), "--layers", "one", "--out", str(out)],
    ):
        assert CliRunner().invoke(app, wrong).exit_code == 2
