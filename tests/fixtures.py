"""Shared fixtures, and what surrounds every test. Models are small; builders with arguments are in tests/models.py."""

from __future__ import annotations

import base64
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from tests import models, shape_checks, shared_models

torch.set_num_threads(1)  # tiny models: a second thread only waits, and the machine is shared

shared_models.install()

STORIES = Path(__file__).resolve().parents[1].parent / "shared" / "models" / "stories260k"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Types are checked anew in each test. Models are shared between tests, not between what is made for more than one test."""
    shape_checks.begin_test()
    shared_models.SHARED.is_open = True
    try:
        return (yield)
    finally:
        shared_models.SHARED.is_open = False
        shared_models.SHARED.models.take_back()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
    was_open = shared_models.SHARED.is_open
    shared_models.SHARED.is_open = was_open and fixturedef.scope == "function"
    try:
        return (yield)
    finally:
        shared_models.SHARED.is_open = was_open


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, in whatever order or selection the suite runs."""
    torch.manual_seed(0)


@pytest.fixture
def gpt2() -> TransformerBridge:
    return models.build_gpt2()


@pytest.fixture
def neox_parallel() -> TransformerBridge:
    return models.build_neox(parallel=True)


@pytest.fixture
def neox_sequential() -> TransformerBridge:
    return models.build_neox(parallel=False)


@pytest.fixture
def llama() -> TransformerBridge:
    return models.build_llama()


@pytest.fixture(params=list(models.NATIVE_VARIANTS))
def native(request: pytest.FixtureRequest) -> TransformerBridge:
    """TransformerLens's native model, once per variant of `models.NATIVE_VARIANTS`."""
    return models.build_native(**models.NATIVE_VARIANTS[request.param])


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [2, 6] that fit every model of tests/models.py."""
    return models.random_tokens()


@pytest.fixture
def pictures_as_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of pages are made, and in place of their pixels, a third of the time of a report, is one dot: for tests of a page's text."""
    dot = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
    monkeypatch.setattr("analyses.views.page.small_png", lambda figure: dot)


@pytest.fixture(scope="session")
def _embedded() -> TransformerBridge:
    from analyses.embedded import load_embedded

    return load_embedded()


@pytest.fixture
def embedded(_embedded: TransformerBridge) -> Iterator[TransformerBridge]:
    """The trained model that ships with the package, loaded once for the session and left free of hooks after each test."""
    yield _embedded
    _embedded.reset_hooks()
    _embedded.zero_grad()


@pytest.fixture(scope="session")
def _stories() -> TransformerBridge:
    if not STORIES.is_dir():
        pytest.skip("needs the trained model ../shared/models/stories260k beside the checkout, which is not there")
    return TransformerBridge.boot_transformers(str(STORIES)).eval()


@pytest.fixture
def stories(_stories: TransformerBridge) -> Iterator[TransformerBridge]:
    """stories260k, a trained Llama-type model (TinyStories), loaded once for the session and left free of hooks after each test."""
    yield _stories
    _stories.reset_hooks()
    _stories.zero_grad()
