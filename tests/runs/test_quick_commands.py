"""Commands of tests share a loaded model only where it is the one that they would load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from analyses.models import loading
from tests import quick_commands
from tests.models import build_with_words


@pytest.fixture
def n_loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each model that is loaded in fact."""
    names: list[str] = []
    load = quick_commands._load

    def counted(name, *arguments, **options):  # type: ignore[no-untyped-def]
        names.append(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(quick_commands, "_load", counted)
    return names


def logits(name: str, **options: str) -> torch.Tensor:
    model = loading.load_model(name, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]]), return_type="logits")


def test_the_same_files_are_loaded_once(tmp_path: Path, n_loads: list[str]) -> None:
    build_with_words(tmp_path, ["she", "he"])
    first = logits(str(tmp_path))
    assert torch.equal(logits(str(tmp_path)), first) and len(n_loads) == 1
    assert logits(str(tmp_path), dtype="float64").dtype == torch.float64 and len(n_loads) == 2
    build_with_words(tmp_path, ["she", "he", "it"])
    assert logits(str(tmp_path)).shape != first.shape and len(n_loads) == 3


def test_a_model_that_is_changed_or_held_is_not_shared(tmp_path: Path, n_loads: list[str]) -> None:
    build_with_words(tmp_path, ["she", "he"])
    first = logits(str(tmp_path))
    for change in (
        lambda model: model.add_hook("blocks.0.hook_out", lambda x, hook: x * 2),
        lambda model: model.unembed.weight.data.mul_(2),
        lambda model: model.train(),
    ):
        change(loading.load_model(str(tmp_path)))
        before = len(n_loads)
        assert torch.equal(logits(str(tmp_path)), first) and len(n_loads) == before + 1
    held = loading.load_model(str(tmp_path))
    before = len(n_loads)
    assert loading.load_model(str(tmp_path)) is not held and len(n_loads) == before + 1
