"""What makes a command quick in tests: the model that the one before it has loaded, and circuits of few sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.models import loading
from tests.shared_models import Lent

_load = loading.load_model
_models = Lent(kept=16)  # those used last wait for the next command


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command gets the model that an earlier one has loaded from the same files and left exactly as it was (tests/shared_models.py)."""

    def load_model(
        name: str = loading.EMBEDDED,
        trust_remote_code: bool = False,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: str | None = None,
    ) -> TransformerBridge:
        _models.take_back()
        key = repr((name, _files(Path(name)), trust_remote_code, dtype, device))
        return _models.lend(key, lambda: _load(name, trust_remote_code, dtype=dtype, device=device))

    monkeypatch.setattr(loading, "load_model", load_model)
    yield
    _models.take_back()


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Names, times and sizes of what is in a folder."""
    if not folder.is_dir():
        return []
    return sorted((path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in folder.iterdir())


@pytest.fixture
def circuits_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Circuits are tried in ten sizes, as where there are many edges, and not in every size: for tests of what is done with the curves."""
    monkeypatch.setattr("analyses.circuits.faithfulness.EVERY_K_BELOW", 0)
