"""Models by name: dtype, device, and what is said where a model cannot be loaded."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
import transformers

from analyses import load_model
from lens_relevance import RelevanceError
from tests.models import build_with_words, random_tokens


def test_an_unsupported_architecture_is_named_in_the_words_of_transformer_lens(tmp_path: Path) -> None:
    """Offline too, where every error once read "is not a folder here"."""
    config = transformers.AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_hidden_layers=1
    )
    transformers.AlbertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(RelevanceError, match="AlbertForMaskedLM.*Could not determine supported architecture.*declare_sites") as caught:
        load_model(str(tmp_path))
    assert "not a folder" not in str(caught.value)


def test_an_error_in_a_folder_is_told_as_it_is(tmp_path: Path) -> None:
    build_with_words(tmp_path, ["she", "he"])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RelevanceError, match="JSON"):
        load_model(str(tmp_path))


def test_dtype_and_device_of_the_embedded_model() -> None:
    tokens = random_tokens()
    spread, half = load_model(device="auto"), load_model(dtype=torch.bfloat16, device="cpu")
    assert torch.equal(spread(tokens), load_model()(tokens))
    assert {p.dtype for p in half.original_model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(RelevanceError, match=f"no device '{device}'"):
        load_model(device=device)


@pytest.mark.parametrize("dtype", ["int8", "float23", torch.int64])
def test_dtypes_that_weights_cannot_have(dtype: str | torch.dtype) -> None:
    with pytest.raises(RelevanceError, match="bfloat16"):
        load_model(dtype=dtype)


def test_waiting_is_shown_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        load_model()
        assert ("Loading embedded" in stream.getvalue()) is terminal
