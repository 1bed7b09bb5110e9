"""Pairs per pass: as many as fit, on a processor no more than keep it busy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analyses.datasets import pass_size
from analyses.datasets.pass_size import pairs_per_pass
from analyses.evaluation.ranking import rank_heads
from analyses.methods import estimator
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, logit_diff
from lens_relevance.memory import estimate_of_run
from tests import models

METHOD = estimator("deeplift")


def pairs(n: int, pos: int = 16) -> PromptPairs:
    return PromptPairs(models.random_tokens(n, pos, seed=1), models.random_tokens(n, pos, seed=2), logit_diff(3, 4))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many bytes be free."""
    return lambda n: monkeypatch.setattr(estimate_of_run, "free_bytes", lambda device: int(n))


def work_of(monkeypatch: pytest.MonkeyPatch, model: Any, data: PromptPairs) -> Callable[[int], estimate_of_run.Estimate]:
    """The estimate of a pass of so many pairs, as `pairs_per_pass` makes it."""
    seen: list[Any] = []
    monkeypatch.setattr(pass_size, "surely_fits", lambda work: seen.append(work))
    pairs_per_pass(model, data, [METHOD], ["heads"])
    monkeypatch.undo()
    one = seen[0]
    return lambda size: estimate_of_run.Estimate(replace(one, batch=size))


def test_a_processor_gets_about_2048_tokens_where_memory_allows() -> None:
    assert pairs_per_pass(models.build_gpt2(), pairs(300), [METHOD], ["heads"]) == 128


def test_as_many_as_fit(monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]) -> None:
    model, data = models.build_gpt2(), pairs(300)
    passes = work_of(monkeypatch, model, data)
    for size in (64, 8, 1):
        free(2.05 * passes(size).plain_bytes)
        assert pairs_per_pass(model, data, [METHOD], ["heads"]) == size
    free(1.0)
    assert pairs_per_pass(model, data, [METHOD], ["heads"]) == 1


def test_a_gpu_gets_as_many_as_fit_whatever_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pass_size, "device_of", lambda model: torch.device("cuda"))
    assert pairs_per_pass(models.build_gpt2(), pairs(300), [METHOD], ["heads"]) == 300


def test_a_ranking_is_the_same_with_little_memory(monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]) -> None:
    model, data = models.build_gpt2(), pairs(5)
    passes = work_of(monkeypatch, model, data)
    whole = rank_heads(model, data)
    free(2.05 * passes(2).plain_bytes)
    parts = rank_heads(model, data)
    assert whole["score"].abs().max() > 0
    assert (whole["score"] - parts["score"]).abs().max() < 1e-5 * whole["score"].abs().max()


def test_a_resumed_run_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]) -> None:
    model, data = models.build_gpt2(), pairs(5)
    passes = work_of(monkeypatch, model, data)
    first = rank_heads(model, data, checkpoint=tmp_path)
    free(2.05 * passes(2).plain_bytes)
    assert pairs_per_pass(model, data, [METHOD], ["heads"]) == 2
    assert rank_heads(model, data, checkpoint=tmp_path).equals(first)


def test_no_pairs() -> None:
    with pytest.raises(RelevanceError, match="no pairs"):
        rank_heads(models.build_gpt2(), pairs(5)[:0])
