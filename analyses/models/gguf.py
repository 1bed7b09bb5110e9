"""GGUF files, as llama.cpp uses them: read by transformers, every weight dequantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_device
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

from lens_relevance import RelevanceError

_ROPE_FACTORS = "rope_freqs.weight"  # by which Llama 3.1 and later divide the frequencies of their rotary embedding


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def load_gguf(path: Path, dtype: torch.dtype, device: str | None) -> TransformerBridge:
    """A TransformerBridge over the decoder in a GGUF file, with the file's own tokenizer.

    transformers reads the file; it holds no pickle and no code. Settings for which the file has no entry take the default of the
    model's config class, as everywhere in transformers (`query_pre_attn_scalar` of Gemma, for one).

    Args:
        path: the file.
        dtype: of the weights after dequantising.
        device: where the model goes, or "auto" to spread it by accelerate.

    Raises:
        RelevanceError: the file is missing or not GGUF, it lacks some of the model's weights, or it states something about its
            rotary embedding that the reader would leave out.
        ValueError, KeyError: the reader does not know the architecture.
    """
    if not path.is_file():
        raise RelevanceError(f"there is no file {path}")
    if find_spec("gguf") is None:
        raise RelevanceError("reading a GGUF file needs the package gguf: pip install gguf (the extra [gguf])")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RelevanceError(f"{path} is not a GGUF file, whatever its name says")
    loader: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _one_quiet_reader():
        config = AutoConfig.from_pretrained(**source)
        factors = _rope_factors(str(path), config)
        model = loader.from_pretrained(
            **source,
            config=config,
            dtype=dtype,
            device_map="auto" if device == "auto" else None,
            attn_implementation="eager",
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    if factors is not None:
        frequencies = model.model.rotary_emb.inv_freq
        frequencies /= factors.to(frequencies.device)
    model.config.architectures = [type(model).__name__]
    if hasattr(model.config, "quantization_config"):  # the weights are plain tensors now
        del model.config.quantization_config
    if device != "auto":
        model = model.to(device or get_device())
    return TransformerBridge.boot_transformers(path.name, hf_model=model, tokenizer=tokenizer, dtype=dtype)


@contextmanager
def _one_quiet_reader() -> Iterator[None]:
    """The file is opened once for config, weights and tokenizer, as that walks through the whole vocabulary, which takes ten seconds
    where it has 262,144 tokens; and the reader's own bar, which transformers' switch for bars does not reach, stays away."""
    package: Any = import_module("gguf")
    loading: Any = modeling_gguf_pytorch_utils
    reader, bar = package.GGUFReader, loading.tqdm
    package.GGUFReader, loading.tqdm = cache(reader), partial(bar, disable=True)
    try:
        yield
    finally:
        package.GGUFReader, loading.tqdm = reader, bar


def _rope_factors(path: str, config: Any) -> torch.Tensor | None:
    """By what the rotary frequencies of a Llama 3.1 or later are divided: a tensor of the file that transformers' reader leaves out.

    Raises RelevanceError for any other scaling of them, which would be left out silently.
    """
    from transformers.integrations.gguf import read_gguf_metadata

    metadata, names = read_gguf_metadata(path)
    kind = metadata.get(f"{metadata['general.architecture']}.rope.scaling.type", "none")
    others = [name for name in names if name.startswith("rope_") and name != _ROPE_FACTORS]
    known = {settings.get("rope_type", "default") for settings in _rope_settings(config)}
    if others or (kind != "none" and known == {"default"}):
        raise RelevanceError(
            f"{path} scales its rotary embedding ({others[0] if others else kind}), and transformers' reader of GGUF files would leave "
            "that out; load the model's folder in Hugging Face format instead"
        )
    if _ROPE_FACTORS not in names:
        return None
    tensors = import_module("gguf").GGUFReader(path).tensors
    return torch.tensor(next(tensor.data for tensor in tensors if tensor.name == _ROPE_FACTORS))


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """The settings of a rotary embedding; models with several kinds of layers have one for each kind."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [settings] if "rope_type" in settings else [s for s in settings.values() if isinstance(s, dict)]
