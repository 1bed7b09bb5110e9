from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformer_lens.patching as tl_patching
from transformer_lens.model_bridge import TransformerBridge

from tests.analyses.patching.helpers import FAMILIES, state


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl_patching, "tqdm", lambda items, **kwargs: items)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[TransformerBridge, str]:
    build, shortcut = FAMILIES[request.param]
    return build(), shortcut


@pytest.fixture
def unchanged() -> Iterator[Callable[[TransformerBridge], TransformerBridge]]:
    """Register a model whose state has to be the same at the end of the test."""
    kept: list[tuple[TransformerBridge, tuple[Any, ...]]] = []

    def register(model: TransformerBridge) -> TransformerBridge:
        kept.append((model, state(model)))
        return model

    yield register
    for model, before in kept:
        assert state(model) == before
