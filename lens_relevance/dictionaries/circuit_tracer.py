"""Folders of circuit-tracer: transcoders of all layers, each for its own layer or across layers, with `config.yaml`.

Per layer: `layer_3.safetensors` with W_enc and W_dec [feature, d_model], b_enc, b_dec, and perhaps W_skip [d_out, d_in] and
`activation_function.threshold`. Across layers: `W_enc_3.safetensors` with W_enc_3, b_enc_3, b_dec_3 (the bias of layer 3's output) and
perhaps threshold_3, and `W_dec_3.safetensors` with W_dec_3 [feature, layers from 3 on, d_model].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lens_relevance.dictionaries.activation import FeatureActivation, JumpReLU, ReLU, TopK
from lens_relevance.dictionaries.dictionary import Dictionary
from lens_relevance.dictionaries.files import Weights
from lens_relevance.errors import RelevanceError

CONFIG = "config.yaml"
_LAYER, _ENCODER = re.compile(r"layer_(\d+)\.safetensors"), re.compile(r"W_enc_(\d+)\.safetensors")


def is_circuit_tracer(folder: Path) -> bool:
    """Whether a folder holds transcoders in circuit-tracer's form."""
    return bool(_numbered(folder, _LAYER) or _numbered(folder, _ENCODER))


def read_circuit_tracer(folder: Path, layers: Sequence[int] | None) -> list[Dictionary]:
    """The transcoders of a folder, of all layers or of these."""
    config = _config(folder)
    crossing = _numbered(folder, _ENCODER)
    files = crossing or _numbered(folder, _LAYER)
    if sorted(files) != list(range(len(files))) and crossing:
        raise RelevanceError(f"{folder}: of a cross-layer transcoder all layers are needed, and there are {sorted(files)}")
    chosen = sorted(files) if layers is None else list(layers)
    missing = [layer for layer in chosen if layer not in files]
    if missing:
        raise RelevanceError(f"{folder} has no transcoder of layer(s) {', '.join(map(str, missing))}; it has {sorted(files)}")
    if crossing and len(chosen) < len(files):
        raise RelevanceError(f"{folder} is a cross-layer transcoder: what layers write is a sum over all earlier ones; leave out layers=")
    if crossing:
        return [_crossing_layer(files[layer], layer, len(files), config=config) for layer in chosen]
    return [_one_layer(files[layer], layer, config) for layer in chosen]


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.exists():
        return {}
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RelevanceError(f"{file} cannot be read as YAML ({error})") from error
    if not isinstance(config, dict):
        raise RelevanceError(f"{file} holds no names with values")
    return config


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    return {int(found[1]): path for path in folder.iterdir() if (found := pattern.fullmatch(path.name))}


def _point(layer: int, hook: str) -> str:
    return f"blocks.{layer}.{hook}"


def _hooks(config: dict[str, Any]) -> tuple[str, str]:
    """HookPoints within a block that are read and written; what circuit-tracer takes where the configuration names none."""
    return str(config.get("feature_input_hook", "hook_resid_mid")), str(config.get("feature_output_hook", "hook_mlp_out"))


def _one_layer(file: Path, layer: int, config: dict[str, Any]) -> Dictionary:
    weights, (reads, writes) = Weights(file), _hooks(config)
    k = weights.take_any("k")
    threshold = weights.take_any("activation_function.threshold")
    activation: FeatureActivation
    if threshold is not None:
        activation = JumpReLU(threshold.flatten())
    elif k is not None or config.get("activation") == "topk":
        number = config.get("k") if k is None else int(k)
        if not isinstance(number, int):
            raise RelevanceError(f"{file.parent / CONFIG} has activation topk and does not say how many features it keeps (k)")
        activation = TopK(number)
    elif config.get("activation", "relu") == "relu":
        activation = ReLU()
    else:
        raise RelevanceError(
            f"{file}: the activation {config['activation']!r} is not known; there are relu, topk, and thresholds in the file"
        )
    dictionary = Dictionary(
        encoder=weights.take("W_enc", 2),
        encoder_bias=weights.take("b_enc", 1),
        decoder=(weights.take("W_dec", 2),),
        decoder_bias=weights.take("b_dec", 1),
        activation=activation,
        point_in=_point(layer, reads),
        point_out=(_point(layer, writes),),
        skip=weights.take("W_skip", 2) if "W_skip" in weights else None,
        source=str(file),
    )
    weights.refuse_rest()
    return dictionary


def _crossing_layer(file: Path, layer: int, n_layers: int, *, config: dict[str, Any]) -> Dictionary:
    weights, decoders, (reads, writes) = Weights(file), Weights(file.with_name(f"W_dec_{layer}.safetensors")), _hooks(config)
    decoder = decoders.take(f"W_dec_{layer}", 3)
    if decoder.shape[1] != n_layers - layer:
        raise RelevanceError(
            f"{decoders.path} writes to {decoder.shape[1]} layers, where layer {layer} of {n_layers} writes to {n_layers - layer}"
        )
    threshold = weights.take_any(f"threshold_{layer}")
    dictionary = Dictionary(
        encoder=weights.take(f"W_enc_{layer}", 2),
        encoder_bias=weights.take(f"b_enc_{layer}", 1),
        decoder=tuple(decoder[:, i].contiguous() for i in range(decoder.shape[1])),
        decoder_bias=weights.take(f"b_dec_{layer}", 1),
        activation=ReLU() if threshold is None else JumpReLU(threshold.flatten()),
        point_in=_point(layer, reads),
        point_out=tuple(_point(later, writes) for later in range(layer, n_layers)),
        set_name=str(file.parent),
        source=str(file),
    )
    weights.refuse_rest()
    decoders.refuse_rest()
    return dictionary
