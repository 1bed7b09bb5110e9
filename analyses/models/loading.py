"""Models for the command line: the embedded one, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from analyses.models.encoders import load_encoder
from lens_relevance import RelevanceError

EMBEDDED = "embedded"


def load_model(name: str = EMBEDDED, trust_remote_code: bool = False) -> TransformerBridge:
    """A model in eval mode.

    Args:
        name: "embedded" (the model that ships with the package), a folder with a model in Hugging Face format, or a hub name ("gpt2").
        trust_remote_code: let the model's repository run its own code. Off, because it can do anything.

    Weights are read from safetensors only: other formats are pickles, which can run code too.

    Raises RelevanceError where there is no such model, it needs code of its own, or it has no safetensors.
    """
    if name == EMBEDDED:
        from analyses.embedded import load_embedded

        return load_embedded()
    folder = Path(name).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise RelevanceError(f"{name} is not a folder of a model in Hugging Face format: it has no config.json")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise RelevanceError(f"there is no folder {name}")
    source = str(folder) if folder.exists() else name
    if folder.exists() and not any(folder.glob("*.safetensors")):
        raise RelevanceError(f"{name} holds no *.safetensors; convert its weights first (model.save_pretrained writes safetensors)")
    with _quiet(), _safetensors_only():
        try:
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            bridge = load_encoder(source, config) or TransformerBridge.boot_transformers(source, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise RelevanceError(_explained(name, error)) from error
    return bridge.eval()


def _explained(name: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{name} brings code of its own; read it, and if you trust it say --trust-remote-code"
    if "safetensors" in text and not isinstance(error, ValueError):
        return f"{name} holds no safetensors weights, the only ones that are loaded here"
    if os.environ.get("HF_HUB_OFFLINE") == "1" or "connect" in text.lower() or "offline" in text.lower():
        return f"{name} is not a folder here, and the hub cannot be reached or does not hold it: give a folder, or 'embedded'"
    return f"cannot load {name}: {text[:300]}"


@contextmanager
def _safetensors_only() -> Iterator[None]:
    """Every from_pretrained inside asks for safetensors; the bridge's loader has no such option."""
    original = inspect.getattr_static(PreTrainedModel, "from_pretrained")

    def from_pretrained(cls: type[PreTrainedModel], *args: object, **kwargs: object) -> object:
        return original.__func__(cls, *args, **{**kwargs, "use_safetensors": True})

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading bars of transformers go where ours go: nowhere."""
    bars, level = transformers_logging.is_progress_bar_enabled(), logging.getLogger().level
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
