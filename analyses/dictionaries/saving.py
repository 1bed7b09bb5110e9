"""A dictionary as a folder that other tools read too: an autoencoder as SAELens writes one, a transcoder as circuit-tracer does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml  # type: ignore[import-untyped]
from safetensors.torch import save_file
from torch import Tensor

from lens_relevance import Dictionary, RelevanceError
from lens_relevance.dictionaries import JumpReLU, ReLU, TopK
from lens_relevance.whole_files import write_whole

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def save_dictionary(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary, to be read by `read_dictionary(folder)` (autoencoders) or `read_dictionaries(folder)` (transcoders).

    Transcoders of several layers can share a folder, if they read and write at the same HookPoints of their blocks.

    Raises:
        RelevanceError: The dictionary is gated, normalises its input or writes to several HookPoints, for which no form is written.
    """
    folder = Path(folder)
    if len(dictionary.point_out) > 1 or dictionary.normalization != "none" or not isinstance(dictionary.activation, ReLU | JumpReLU | TopK):
        raise RelevanceError(
            f"{dictionary!r} cannot be saved: only ReLU, JumpReLU and TopK, without normalization, written to one HookPoint"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if dictionary.is_autoencoder:
        return _save_saelens(dictionary, folder)
    return _save_transcoder(dictionary, folder)


def _save_saelens(dictionary: Dictionary, folder: Path) -> Path:
    activation = dictionary.activation
    names = {ReLU: "standard", JumpReLU: "jumprelu", TopK: "topk"}
    config = {
        "architecture": names[type(activation)],
        "d_in": dictionary.d_in,
        "d_sae": dictionary.n_features,
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": dictionary.point_in},
    }
    tensors = {
        "W_enc": dictionary.encoder.T,
        "b_enc": _bias(dictionary),
        "W_dec": dictionary.decoder[0],
        "b_dec": dictionary.decoder_bias,
    }
    if isinstance(activation, TopK):
        config["k"] = activation.k
    if isinstance(activation, JumpReLU):
        tensors["threshold"] = activation.threshold
    _write(folder / "sae_weights.safetensors", tensors)
    write_whole(folder / "cfg.json", lambda beside: beside.write_text(json.dumps(config, indent=1), encoding="utf-8"))
    return folder


def _save_transcoder(dictionary: Dictionary, folder: Path) -> Path:
    found = [_BLOCK.fullmatch(name) for name in (dictionary.point_in, dictionary.point_out[0])]
    if found[0] is None or found[1] is None or found[0][1] != found[1][1]:
        raise RelevanceError(f"{dictionary!r} cannot be saved: circuit-tracer's transcoders read and write in one block")
    activation = dictionary.activation
    tensors = {
        "W_enc": dictionary.encoder,
        "b_enc": _bias(dictionary),
        "W_dec": dictionary.decoder[0],
        "b_dec": dictionary.decoder_bias,
    }
    if dictionary.skip is not None:
        tensors["W_skip"] = dictionary.skip
    if isinstance(activation, TopK):
        tensors["k"] = torch.tensor(activation.k)
    if isinstance(activation, JumpReLU):
        tensors["activation_function.threshold"] = activation.threshold
    _write(folder / f"layer_{found[0][1]}.safetensors", tensors)
    config = {"model_kind": "transcoder_set", "feature_input_hook": found[0][2], "feature_output_hook": found[1][2]}
    write_whole(folder / "config.yaml", lambda beside: beside.write_text(yaml.safe_dump(config), encoding="utf-8"))
    return folder


def _bias(dictionary: Dictionary) -> Tensor:
    """What features read of a zero activation, the input's bias included."""
    if dictionary.input_bias is None:
        return dictionary.encoder_bias
    return dictionary.encoder_bias - dictionary.encoder @ dictionary.input_bias


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    contiguous = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    write_whole(path, lambda beside: save_file(contiguous, str(beside)))
