"""PromptPairs: rows, masks and targets stay together through indexing, batching, files and text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.tasks import PromptPairs, greater_than, ioi
from lens_relevance.errors import RelevanceError
from lens_relevance.inputs.targets import logit, logit_diff
from tests.models import build_with_words, random_tokens

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Mary gave a drink to"


@pytest.fixture
def pairs() -> PromptPairs:
    target = logit_diff(torch.tensor([3, 5, 7, 9]), torch.tensor([4, 6, 8, 10]))
    return PromptPairs(random_tokens(4, 6, seed=1), random_tokens(4, 6, seed=2), target)


def values(model: TransformerBridge, pairs: PromptPairs) -> Tensor:
    with torch.no_grad():
        return pairs.metric(model)(model(pairs.clean))


def test_masks_default_to_ones_and_shapes_must_agree(pairs: PromptPairs) -> None:
    assert torch.equal(pairs.clean_mask, torch.ones(4, 6, dtype=torch.long))
    assert torch.equal(pairs.corrupt_mask, pairs.clean_mask)
    with pytest.raises(RelevanceError, match="position must mean the same"):
        without_type_checks(pairs, corrupt=random_tokens(4, 7))
    with pytest.raises(RelevanceError, match=r"clean_mask has shape \(4, 5\)"):
        without_type_checks(pairs, clean_mask=torch.ones(4, 5, dtype=torch.long))
    with pytest.raises(jaxtyping.TypeCheckError):
        PromptPairs(random_tokens(4, 6).float(), random_tokens(4, 6), logit(1))


def without_type_checks(pairs: PromptPairs, **changes: Tensor) -> None:
    """What a user without run-time type checks gets: these would be faster than the messages."""
    changed = object.__new__(PromptPairs)
    for name, value in (vars(pairs) | changes).items():
        object.__setattr__(changed, name, value)
    changed.__post_init__()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (2, [2]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        ([3, 0], [3, 0]),
        ([True, False, False, True], [0, 3]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor(2), [2]),
        (torch.tensor([False, True, True, False]), [1, 2]),
    ],
)
def test_rows_keep_prompts_and_target_together(gpt2: TransformerBridge, pairs: PromptPairs, rows: object, expected: list[int]) -> None:
    chosen = pairs[rows]  # type: ignore[index]
    assert torch.equal(chosen.clean, pairs.clean[expected])
    assert torch.equal(chosen.corrupt, pairs.corrupt[expected])
    whole = values(gpt2, pairs)
    assert whole.abs().min() > 1e-3  # rows that differ, so that a wrong choice shows
    torch.testing.assert_close(values(gpt2, chosen), whole[expected])


def test_a_row_that_is_not_there_is_an_error(pairs: PromptPairs) -> None:
    for row in (4, -5):
        with pytest.raises(IndexError, match="of 4 pairs"):
            pairs[row]


def test_no_rows_are_pairs_too(pairs: PromptPairs) -> None:
    for rows in ([], slice(0, 0), torch.zeros(4, dtype=torch.bool)):
        assert pairs[rows].clean.shape == (0, 6)


def test_batches_cover_all_rows_once(gpt2: TransformerBridge, pairs: PromptPairs) -> None:
    batches = list(pairs.batches(3))
    assert [len(batch) for batch in batches] == [3, 1]
    torch.testing.assert_close(torch.cat([values(gpt2, batch) for batch in batches]), values(gpt2, pairs))
    with pytest.raises(RelevanceError, match="at least one row"):
        next(pairs.batches(0))


def test_a_callable_metric_is_enough(gpt2: TransformerBridge) -> None:
    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 4]

    pairs = PromptPairs(random_tokens(4, 6, seed=1), random_tokens(4, 6, seed=2), metric)
    assert pairs[1:3].target.function is metric  # type: ignore[union-attr]
    with torch.no_grad():
        logits = gpt2(pairs.corrupt)
    assert torch.equal(pairs.metric(gpt2, "corrupt")(logits), logits[:, -1, 3] - logits[:, -1, 4])
    assert pairs.to_frame(gpt2)["answer"].isna().all()


def test_saving_keeps_everything(gpt2: TransformerBridge, pairs: PromptPairs, tmp_path: Path) -> None:
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[0, 4:] = 0
    original = PromptPairs(pairs.clean, pairs.corrupt, pairs.target, mask, mask, dropped=("a word",))
    original.save(tmp_path / "pairs.safetensors")
    loaded = PromptPairs.load(tmp_path / "pairs.safetensors")
    for name in ("clean", "corrupt", "clean_mask", "corrupt_mask"):
        assert torch.equal(getattr(loaded, name), getattr(original, name))
    assert loaded.dropped == ("a word",)
    assert torch.equal(values(gpt2, loaded), values(gpt2, original))
    torch.testing.assert_close(values(gpt2, loaded[[2, 0]]), values(gpt2, original)[[2, 0]])


def test_saving_keeps_strings_and_positions(embedded: TransformerBridge, tmp_path: Path) -> None:
    tokens = embedded.to_tokens([CLEAN, CORRUPT])
    original = PromptPairs(tokens, tokens.flip(0), logit_diff("Mary", "John", position=-2))
    original.save(tmp_path / "pairs.safetensors")
    loaded = PromptPairs.load(tmp_path / "pairs.safetensors")
    assert (loaded.target.answer, loaded.target.wrong, loaded.target.position) == ("Mary", "John", -2)


def test_what_cannot_be_saved_or_loaded_says_so(pairs: PromptPairs, tmp_path: Path) -> None:
    def my_metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3]

    with pytest.raises(RelevanceError, match="my_metric.*cannot be saved"):
        PromptPairs(pairs.clean, pairs.corrupt, my_metric).save(tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    (tmp_path / "text.csv").write_text("clean,corrupt\n")
    with pytest.raises(RelevanceError, match="cannot be read"):
        PromptPairs.load(tmp_path / "text.csv")
    with pytest.raises(RelevanceError, match="cannot be read"):
        PromptPairs.load(tmp_path / "nowhere.safetensors")


def test_later_years_survive_saving(tmp_path: Path) -> None:
    model = build_with_words(tmp_path / "model", "The war lasted from the year to".split())
    original = greater_than(model, 4)
    original.save(tmp_path / "pairs.safetensors")
    loaded = PromptPairs.load(tmp_path / "pairs.safetensors")
    assert torch.equal(values(model, loaded), values(model, original))


def test_from_strings_pads_rows_of_different_length(embedded: TransformerBridge) -> None:
    clean, corrupt = [CLEAN, f"Yesterday, w{CLEAN[1:]}"], [CORRUPT, f"Yesterday, w{CORRUPT[1:]}"]
    pairs = PromptPairs.from_strings(embedded, clean, corrupt, answer=[" Mary", "Mary"], wrong=["John", " John"])
    assert pairs.clean_mask.sum(1).tolist() == [15, 17]
    alone = [PromptPairs.from_strings(embedded, [a], [b], answer=["Mary"], wrong=["John"]) for a, b in zip(clean, corrupt, strict=True)]
    together = values(embedded, pairs)
    assert together.min() > 1
    torch.testing.assert_close(together, torch.cat([values(embedded, pair) for pair in alone]), atol=1e-4, rtol=1e-4)
    frame = pairs.to_frame(embedded)
    assert frame.columns.tolist() == ["clean", "corrupt", "answer", "wrong"]
    assert frame.iloc[1].tolist() == [clean[1], corrupt[1], "Mary", "John"]


def test_from_strings_lists_every_bad_row(embedded: TransformerBridge) -> None:
    longer = CORRUPT.replace("a drink", "drink")
    with pytest.raises(RelevanceError) as caught:
        PromptPairs.from_strings(
            embedded,
            [CLEAN] * 4,
            [CORRUPT, longer, CORRUPT, ""],
            answer=["Mary", "Mary", "Mary John", "Mary"],
            wrong=["John", "John", "Zaphod", "John"],
        )
    message = str(caught.value)
    assert "row 0" not in message
    assert "row 1: clean has 14 tokens" in message and "corrupt has 13" in message
    assert "row 2: answer 'Mary John' is 2 tokens ['Mary', 'John']" in message
    assert "row 2: wrong 'Zaphod' is not in the vocabulary" in message
    assert "row 3: a prompt is empty" in message
    with pytest.raises(RelevanceError, match="'Mary John' is 2 tokens") as caught:  # a single answer stands for both, and is named once
        PromptPairs.from_strings(embedded, [CLEAN], [CORRUPT], answer=["Mary John"], wrong=["Mary John"])
    assert str(caught.value).count("Mary John") == 1 and "wrong" not in str(caught.value)
    with pytest.raises(RelevanceError, match="one entry per row.*'clean': 2.*'corrupt': 1"):
        PromptPairs.from_strings(embedded, [CLEAN] * 2, [CORRUPT], answer=["Mary"], wrong=["John"])


def test_answers_of_a_tokenizer_that_splits_off_a_leading_space(stories: TransformerBridge) -> None:
    girl, boy = "Lily was very happy because", "Tim was very happy because"
    with_space = PromptPairs.from_strings(stories, [girl], [boy], answer=[" she"], wrong=[" he"])
    without = PromptPairs.from_strings(stories, [girl], [boy], answer=["she"], wrong=["he"])
    assert with_space.to_frame(stories)["answer"].tolist() == ["she"]
    assert torch.equal(values(stories, with_space), values(stories, without))


def _csv(rows: list[dict[str, str]]) -> str:
    return "clean,corrupt,answer,wrong\n" + "".join(",".join(f'"{row[key]}"' for key in row) + "\n" for row in rows)


def _jsonl(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(("suffix", "write"), [("csv", _csv), ("jsonl", _jsonl)])
def test_from_file(embedded: TransformerBridge, tmp_path: Path, suffix: str, write: Callable[[list[dict[str, str]]], str]) -> None:
    rows = [
        dict(clean=CLEAN, corrupt=CORRUPT, answer=" Mary", wrong=" John"),
        dict(clean=CORRUPT, corrupt=CLEAN, answer="John", wrong="Mary"),
    ]
    path = tmp_path / f"pairs.{suffix}"
    path.write_text(write(rows))
    pairs = PromptPairs.from_file(embedded, path)
    assert pairs.to_frame(embedded)["clean"].tolist() == [CLEAN, CORRUPT]
    assert pairs.to_frame(embedded)["answer"].tolist() == ["Mary", "John"]
    path.write_text(write([{**rows[0], "answer": ""}]))
    with pytest.raises(RelevanceError, match="row.* 0 lack a text"):
        PromptPairs.from_file(embedded, path)


def test_from_file_names_what_is_wrong_with_the_file(embedded: TransformerBridge, tmp_path: Path) -> None:
    def attempt(name: str, text: str, message: str) -> None:
        (tmp_path / name).write_text(text)
        with pytest.raises(RelevanceError, match=message):
            PromptPairs.from_file(embedded, tmp_path / name)

    attempt("a.csv", "clean,corrupt\nx,y\n", "lacks the column.* answer, wrong")
    attempt("b.csv", "", "cannot be read")
    attempt("c.jsonl", "{not json", "not one JSON object per line")
    attempt("d.txt", "x", "from .csv or .jsonl")
    with pytest.raises(RelevanceError, match="there is no file"):
        PromptPairs.from_file(embedded, tmp_path / "none.csv")


def test_moving_keeps_the_pairs(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, 2)
    moved = pairs.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in ("clean", "corrupt", "clean_mask", "corrupt_mask"))
    assert moved.target is pairs.target
