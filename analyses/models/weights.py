"""Weights and settings of a model on disk: checked to be whole, and to be those of the model that is made of them.

transformers gives random numbers to weights that a file lacks, and leaves out what has no place in the model; it says so in a log.
Relevance of such a model would be wrong without anybody noticing, so both are errors here.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from lens_relevance import RelevanceError

_LARGE = 2**20  # bytes of JSON from which on it is not read twice
_SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def check_folder(folder: Path) -> None:
    """Check that the files of a model are whole, as far as they tell it by themselves.

    Raises:
        RelevanceError: names the file.
    """
    for path in (*(folder / name for name in _SETTINGS), *folder.glob("*.safetensors*")):
        if path.is_dir():
            raise RelevanceError(f"{path} is a folder where a file belongs")
        try:
            if path.suffix == ".json" and path.exists():
                _check_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
        except (OSError, ValueError, SafetensorError) as error:
            raise RelevanceError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); get the file again") from error


def _check_json(path: Path) -> None:
    content = path.read_bytes().strip()
    content.decode("utf-8")
    is_object = content.startswith(b"{") and content.endswith(b"}")
    if is_object and len(content) < _LARGE:
        is_object = isinstance(json.loads(content), dict)
    if not is_object:
        raise ValueError("empty" if not content else "it is no JSON object")


@contextmanager
def checked_weights(folder: Path | None) -> Iterator[None]:
    """Every from_pretrained inside asks for safetensors, and refuses weights that do not fit the model.

    Args:
        folder: where the weights are, if they are on disk.
    """
    original = inspect.getattr_static(PreTrainedModel, "from_pretrained")

    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        if folder is not None and kwargs.get("config") is not None and "gguf_file" not in kwargs:
            _check_names(cls, kwargs["config"], folder)
        settings = {**kwargs, "use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, report = original.__func__(cls, *args, **settings)
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path", "")
        _check_report(model, report, "/".join(filter(None, (str(source), kwargs.get("gguf_file")))))
        return (model, report) if output_loading_info else model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel.from_pretrained = original  # type: ignore[method-assign]


def _check_names(kind: type[PreTrainedModel], config: Any, folder: Path) -> None:
    """Refuse files of which not one tensor has a place in the model, before memory is taken for a model that may be large."""
    held: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            held |= set(file.keys())
    try:
        with torch.device("meta"):
            wanted = kind._from_config(config).state_dict().keys()
    except Exception:  # transformers will say by itself what is wrong with the settings
        return
    # A file of the model without its head has names without the prefix, and the other way round.
    if not any(a == b or a.endswith(f".{b}") or b.endswith(f".{a}") for a in held for b in wanted if a[-12:] == b[-12:]):
        example = f" ({min(held)} for one)" if held else ""
        raise RelevanceError(
            f"cannot load {folder}: none of the {len(held)} tensors in its files{example} belongs to a {kind.__name__}, which config.json "
            "names"
        )


def _check_report(model: PreTrainedModel, report: dict[str, Any], source: str) -> None:
    """Refuse what transformers reports and goes on with."""
    name = type(model).__name__
    if getattr(model.config, "num_hidden_layers", 1) == 0:
        raise RelevanceError(f"cannot load {source}: config.json gives the model no layers")
    if mismatched := sorted(report.get("mismatched_keys") or []):
        key, there, wanted = (*mismatched[0], None, None)[:3]
        raise RelevanceError(
            f"cannot load {source}: config.json and the weights disagree: {key} has shape {_shape(there)} in the file and "
            f"{_shape(wanted)} in a {name} of config.json"
        )
    # The pooler of an encoder without a head is not part of what is explained: the last hidden state.
    if missing := sorted(key for key in report.get("missing_keys") or [] if not key.startswith("pooler.")):
        raise RelevanceError(
            f"cannot load {source}: its files lack {len(missing)} of the weights of a {name} ({missing[0]} for one), which would be random "
            "numbers; get all of them, or the config.json that belongs to them"
        )
    layers = {_any_layer(key) for key in model.state_dict()}
    if left := sorted(key for key in report.get("unexpected_keys") or [] if _any_layer(key) in layers):
        raise RelevanceError(
            f"cannot load {source}: its files hold {len(left)} weights of layers that config.json does not have ({left[0]} for one); get "
            "the config.json that belongs to them"
        )


def _any_layer(key: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", f".{key}")


def _shape(shape: Any) -> list[int]:
    return list(shape or [])
