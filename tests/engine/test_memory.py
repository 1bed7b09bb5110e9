"""The memory of a run: what is estimated from a trial of a few tokens, against what the profiler of torch sees of the run itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from analyses.benchmarks.estimates import allocated
from lens_relevance import Estimate, RelevanceError, estimate, logit, mean_embedding, propagate, random_tokens
from lens_relevance.hooks import attention_by_rows as by_rows
from lens_relevance.memory import estimate_of_run, free_memory
from lens_relevance.rules import attention_by_rows as rows
from tests import models
from tests.classifiers import build_classifier, inputs_for
from tests.engine.families import build

POSITIONS = 32


def tokens(batch: int, seed: int = 0) -> Tensor:
    return models.random_tokens(batch, POSITIONS, seed=seed)


def peak(found: Estimate, recompute: bool) -> int:
    bytes_ = found.recompute_bytes if recompute else found.plain_bytes
    assert bytes_ is not None
    return bytes_


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral"])
def test_within_15_percent_of_the_measured_peak(family: str, rules: str, recompute: bool) -> None:
    model = build(family, torch.float32, n_layers=3) if family != "mixtral" else build(family, torch.float32)
    reference = tokens(16, seed=1) if rules == "deeplift" else None
    found = peak(estimate(model, POSITIONS, 16, rules=rules), recompute)
    run = lambda: propagate(model, tokens(16), logit(3), rules=rules, reference=reference, recompute=recompute)  # noqa: E731
    run()  # what is computed once per model
    assert found == pytest.approx(allocated(run), rel=0.15)


@pytest.mark.parametrize(
    "settings",
    [
        {"names_filter": "embed.hook_out"},
        {"names_filter": lambda name: True},
        {"reference": mean_embedding(), "rules": "deeplift"},
        {"reference": random_tokens(3), "rules": "deeplift"},
        {"audit": True},
        {"target": lambda logits: logits.logsumexp((1, 2))},
    ],
    ids=["embeddings alone", "everything", "mean embedding", "three random references", "audit", "a function"],
)
def test_whatever_is_asked_for(settings: dict[str, Any]) -> None:
    model, target = build("llama", torch.float32, n_layers=3), settings.pop("target", logit(3))
    settings = {"rules": "attnlrp", **settings}
    found = estimate(model, POSITIONS, 8, target=target, **settings).plain_bytes
    run = lambda: propagate(model, tokens(8), target, **settings, recompute=False)  # noqa: E731
    run()
    assert found == pytest.approx(allocated(run), rel=0.15)


def test_attention_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_rows, "AT_ONCE", 0)
    monkeypatch.setattr(rows, "ROWS", 4)
    model = build("llama", torch.float32, n_layers=3, max_position_embeddings=128)
    ids = models.random_tokens(4, 128, seed=0)
    found = peak(estimate(model, 128, 4, rules="attnlrp", names_filter="embed.hook_out"), True)
    run = lambda: propagate(model, ids, logit(3), rules="attnlrp", names_filter="embed.hook_out", recompute=True)  # noqa: E731
    run()
    assert found == pytest.approx(allocated(run), rel=0.15)
    monkeypatch.setattr(by_rows, "AT_ONCE", 2**40)
    assert peak(estimate(model, 128, 4, rules="attnlrp", names_filter="embed.hook_out"), True) > 1.5 * found


def test_what_is_kept_in_a_folder_takes_no_memory(tmp_path: Path) -> None:
    model = build("llama", torch.float32, n_layers=4)
    everything, in_folder, tokens_alone = (
        peak(estimate(model, POSITIONS, 16, **settings), True)
        for settings in ({}, {"device": tmp_path / "kept"}, {"names_filter": "embed.hook_out"})
    )
    assert in_folder < everything and abs(in_folder - tokens_alone) < everything - in_folder
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("size", [("a prompt", 1), (POSITIONS, 0), (POSITIONS, True), (2.0, 1)])
def test_sizes_are_numbers(size: tuple[Any, Any]) -> None:
    with pytest.raises(RelevanceError, match="is a number, at least 1"):
        estimate(build("gpt2", torch.float32), *size)


def test_temporary_files_spare_memory_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays in memory is what a folder leaves there, and `IN_MEMORY` of what is kept; without room for files it is all of it."""
    model, n = build("llama", torch.float32, n_layers=4), 2**12
    estimated = lambda: peak(estimate(model, POSITIONS, 16), True)  # noqa: E731
    everything, in_folder = estimated(), peak(estimate(model, POSITIONS, 16, device=Path("kept")), True)
    monkeypatch.setattr(estimate_of_run, "IN_MEMORY", n)
    monkeypatch.setattr(estimate_of_run, "free_for_files", lambda: 2**40)
    assert estimated() == in_folder + n < everything
    monkeypatch.setattr(estimate_of_run, "IN_MEMORY", 2**40)
    assert estimated() == everything
    monkeypatch.setattr(estimate_of_run, "IN_MEMORY", n)
    monkeypatch.setattr(estimate_of_run, "free_for_files", lambda: 0)
    monkeypatch.setattr(estimate_of_run, "free_bytes", lambda device: in_folder + n)
    assert estimated() == everything
    with pytest.raises(RelevanceError, match="temporary files that has more room and lies on a disk"):
        propagate(model, tokens(16), logit(3), reference=tokens(16, 1), recompute=True)


def test_the_table() -> None:
    found = estimate(build("gpt2", torch.float32), POSITIONS, 2, rules="deeplift")
    frame = found.to_frame()
    assert frame["recompute"].tolist() == [False, True] and frame["fits"].all()
    assert frame["forwards"].tolist() == [2, 4] and frame["backwards"].tolist() == [1, 1]
    assert frame["peak"].tolist() == [found.plain_bytes / 2**30, found.recompute_bytes / 2**30]  # type: ignore[operator]
    assert not found.recompute and found.peak_bytes == found.plain_bytes and f"2 x {POSITIONS} tokens, at once" in repr(found)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many bytes be free."""
    return lambda n: monkeypatch.setattr(estimate_of_run, "free_bytes", lambda device: int(n))


def blocks_run(model: Any, call: Callable[[], Any]) -> int:
    """How often the first block runs in a call."""
    calls: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        call()
    finally:
        handle.remove()
    return len(calls)


def test_block_by_block_where_a_run_does_not_fit_otherwise(little: Callable[[float], None]) -> None:
    model = build("llama", torch.float32, n_layers=6)
    found = estimate(model, POSITIONS, 16, rules="attnlrp")
    assert found.recompute_bytes is not None and found.recompute_bytes < 0.8 * found.plain_bytes
    run = lambda: propagate(model, tokens(16), logit(3), rules="attnlrp")  # noqa: E731
    plain = run()
    little(2 * found.plain_bytes)
    assert estimate(model, POSITIONS, 16, rules="attnlrp").recompute is False
    run()
    assert blocks_run(model, run) == 1
    little(found.plain_bytes)
    assert estimate(model, POSITIONS, 16, rules="attnlrp").recompute is True
    assert blocks_run(model, run) == 2
    again = run()
    assert all(torch.equal(again[name], plain[name]) for name in plain)


def test_what_cannot_fit_is_refused_before_it_starts(little: Callable[[float], None]) -> None:
    model = build("llama", torch.float32, n_layers=6)
    found = estimate(model, POSITIONS, 16, rules="attnlrp")
    little(found.recompute_bytes / 2)  # type: ignore[operator]
    with pytest.raises(RelevanceError, match="16 x 32 tokens.*fewer prompts at once.*names_filter"):
        propagate(model, tokens(16), logit(3), rules="attnlrp")
    ran = blocks_run(model, lambda: pytest.raises(RelevanceError, propagate, model, tokens(16), logit(3), rules="attnlrp"))
    assert ran == 0
    little(found.plain_bytes / 1.3)
    with pytest.raises(RelevanceError, match=r"recompute=True \(\d"):
        propagate(model, tokens(16), logit(3), rules="attnlrp", recompute=False)
    propagate(model, tokens(16), logit(3), rules="attnlrp", recompute=True)


def test_hooks_of_the_user_see_no_trial(little: Callable[[float], None]) -> None:
    model, seen = build("llama", torch.float32, n_layers=2), []
    little(1.0)
    with model.hooks([("blocks.0.hook_in", lambda x, hook: seen.append(x.shape[:2]))]):
        propagate(model, tokens(2), logit(3), rules="attnlrp")
    assert set(seen) == {(2, POSITIONS)}


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_the_bound_under_which_nothing_is_tried_is_one(family: str, little: Callable[[float], None]) -> None:
    filter_ = None if family == "mixtral" else lambda name: True
    found = estimate(build(family, torch.float32), POSITIONS, 16, rules="deeplift", names_filter=filter_)
    little(2 * found.plain_bytes - 1)
    assert not estimate_of_run.surely_fits(found._work)


def test_inputs_without_token_ids_are_left_alone(little: Callable[[float], None]) -> None:
    model, (picture, _) = build_classifier("vit", torch.float32), inputs_for("vit", torch.float32)
    little(1.0)
    assert propagate(model, picture, logit(2), rules="attnlrp").tokens().any()
    with pytest.raises(RelevanceError, match="read tokens"):
        _ = estimate(model, 16).plain_bytes


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    assert free_memory._left_to_container(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert free_memory._left_to_container(tmp_path) == [600]
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory._left_to_container(tmp_path) == []
    assert 0 < free_memory.free_bytes(torch.device("cpu")) < 2**50
