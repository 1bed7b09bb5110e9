"""Models for the command line: the embedded one, a folder, a GGUF file, or a name on the Hugging Face hub."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from analyses.datasets.progress import spinner
from analyses.embedded import EMBEDDED_FOLDER
from analyses.models.encoders import load_encoder
from analyses.models.gguf import is_gguf, load_gguf
from analyses.models.weights import check_folder, checked_weights
from lens_relevance import RelevanceError

EMBEDDED = "embedded"


def load_model(
    name: str = EMBEDDED,
    trust_remote_code: bool = False,
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
) -> TransformerBridge:
    """A model in eval mode.

    Args:
        name: "embedded" (the model that ships with the package), a folder with a model in Hugging Face format, a GGUF file
            ("model.gguf"), or a hub name ("gpt2").
        trust_remote_code: let the model's repository run its own code. Off, because it can do anything.
        dtype: of the weights, as a torch dtype or its name ("bfloat16").
        device: "cpu", "cuda", "cuda:1", ..., or "auto" to let accelerate spread the model over all there are (`device_map="auto"`). None
            takes a GPU where there is one; the embedded model, which is small, then stays on the CPU.

    Weights are read from safetensors or GGUF only: other formats are pickles, which can run code too.

    Raises:
        RelevanceError: there is no such model, dtype or device, TransformerLens has no adapter for the model, it needs code of its own, or
            its weights are in another format.
    """
    weights, place = _dtype(dtype), _device(device)
    source = str(EMBEDDED_FOLDER) if name == EMBEDDED else _source(name)
    config: Any = None
    folder = Path(source) if Path(source).is_dir() else None
    with spinner(f"Loading {name}"), _quiet(), checked_weights(folder):
        try:
            if is_gguf(name):
                return load_gguf(Path(source), weights, place).eval()
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
            encoder = load_encoder(source, config, weights, device=place)
            if encoder is not None:
                return encoder
            where = {"device_map": "auto"} if place == "auto" else {"device": place or ("cpu" if name == EMBEDDED else None)}
            return TransformerBridge.boot_transformers(source, trust_remote_code=trust_remote_code, dtype=weights, **where).eval()
        except RelevanceError:
            raise
        except Exception as error:  # damaged files can cause any
            raise RelevanceError(_explained(name, Path(source).exists(), config, error)) from error


def _source(name: str) -> str:
    """What to load a name from: the file or folder that it names, or else the hub's own name as it is."""
    path = Path(name).expanduser()
    if is_gguf(name):
        return str(path)
    if not path.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise RelevanceError(f"there is no folder {name}")
        return name
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        remedy = f"; name the GGUF file itself: {files[0]}" if files else ""
        raise RelevanceError(f"{name} is not a folder of a model in Hugging Face format: it has no config.json{remedy}")
    if not any(path.glob("*.safetensors")):
        raise RelevanceError(f"{name} holds no *.safetensors; convert its weights first (model.save_pretrained writes safetensors)")
    check_folder(path)
    return str(path)


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    of_weights = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(of_weights, torch.dtype) or not of_weights.is_floating_point:
        raise RelevanceError(f"{dtype!r} is not a dtype for weights: take float32, bfloat16, float16 or float64")
    return of_weights


def _device(device: str | None) -> str | None:
    """The device, if torch can compute on it."""
    if device is not None and device != "auto":
        try:
            torch.zeros(1, device=device).item()
        except (RuntimeError, AssertionError) as error:
            raise RelevanceError(f"there is no device {device!r} here: {str(error).splitlines()[0]}") from error
    return device


def _explained(name: str, local: bool, config: Any, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"{name} brings code of its own; read it, and if you trust it say --trust-remote-code"
    if "safetensors" in text and not isinstance(error, ValueError):
        return f"{name} holds no safetensors weights, the only ones that are loaded here"
    if "supported architecture" in text:
        made_for = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
        words = text.partition(" Available architectures")[0]
        return (
            f"{name} is a model that TransformerLens has no adapter for ({made_for}). Its words: {words} Load it with transformers, and "
            "tell where its operations are with lens_relevance.declare_sites"
        )
    offline = os.environ.get("HF_HUB_OFFLINE") == "1" or "connect" in text.lower() or "offline" in text.lower()
    if isinstance(error, OSError) and offline and not local:
        return f"{name} is not a folder here, and the hub cannot be reached or does not hold it: give a folder, or 'embedded'"
    if isinstance(error, OSError | ValueError):
        return f"cannot load {name}: {text[:300]}"
    return f"cannot load {name}: one of its files is damaged, or they do not belong together ({type(error).__name__}: {text[:200]})"


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading bars of transformers stay away: there is one of ours."""
    bars, level = transformers_logging.is_progress_bar_enabled(), logging.getLogger().level
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.getLogger().setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
