"""Folders of SAELens: `cfg.json` beside `sae_weights.safetensors`.

The encoder is stored as [d_in, feature], the decoder as [feature, d_out]. The decoder's bias is taken off the input where
`apply_b_dec_to_input` says so. What the configuration scales is folded into the weights: `finetuning_scaling_factor` into the decoder, and
`rescale_acts_by_decoder_norm` (TopK and BatchTopK choose by value times the decoder's norm) into encoder and decoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lens_relevance.dictionaries.activation import FeatureActivation, Gated, JumpReLU, ReLU, TopK
from lens_relevance.dictionaries.dictionary import Dictionary, Normalization
from lens_relevance.dictionaries.files import Weights
from lens_relevance.errors import RelevanceError
from lens_relevance.json_files import read_json

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_KINDS = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_NORMALIZATIONS: dict[Any, Normalization] = {
    None: "none",
    False: "none",
    "none": "none",
    "constant_norm_rescale": "constant_norm",
    "layer_norm": "layer_norm",
}


def read_saelens(folder: Path, point_in: str | None, point_out: str | None) -> Dictionary:
    """A dictionary from a folder that SAELens wrote; points that are given go before those of its configuration."""
    file = folder / CONFIG
    config = read_json(file, "the configuration of a dictionary")
    config |= config.get("metadata") or {}  # since version 6 where it reads and writes stands there
    architecture = config.get("architecture", "standard")
    if architecture not in _KINDS:
        raise RelevanceError(f"{file}: architecture {architecture!r} is not known; there are {', '.join(_KINDS)}")
    _refuse_settings(config, file)
    weights = Weights(folder / WEIGHTS)
    decoder, decoder_bias = weights.take("W_dec", 2), weights.take("b_dec", 1)
    encoder = weights.take("W_enc", 2).T.contiguous()
    kind = _KINDS[architecture]
    encoder_bias = torch.zeros(len(encoder), dtype=encoder.dtype) if kind == "gated" else weights.take("b_enc", 1)
    scaling = weights.take_any("scaling_factor")  # older versions write one of ones where it is not used
    if config.get("finetuning_scaling_factor"):
        if scaling is None:
            raise RelevanceError(f"{file} has finetuning_scaling_factor, and {WEIGHTS} has no scaling_factor")
        decoder = scaling.unsqueeze(1) * decoder
    activation = _activation(kind, config, weights, file=file, n_features=len(encoder))
    if config.get("rescale_acts_by_decoder_norm") and kind in ("topk", "batchtopk"):
        norm = decoder.norm(dim=1)
        encoder, encoder_bias, decoder = encoder * norm.unsqueeze(1), encoder_bias * norm, decoder / norm.unsqueeze(1)
    reads = point_in or config.get("hook_name") or config.get("hook_point")
    if reads is None:
        raise RelevanceError(f"{file} does not name a HookPoint; pass point_in=, as in point_in='blocks.7.hook_resid_pre'")
    is_transcoder = "transcoder" in architecture
    writes = point_out or (config.get("hook_name_out") or config.get("hook_point_out") if is_transcoder else reads)
    if writes is None:
        raise RelevanceError(f"{file} does not name the HookPoint that the transcoder writes to; pass point_out=")
    dictionary = Dictionary(
        encoder=encoder,
        encoder_bias=encoder_bias,
        decoder=(decoder,),
        decoder_bias=decoder_bias,
        activation=activation,
        point_in=reads,
        point_out=(writes,),
        input_bias=decoder_bias if not is_transcoder and config.get("apply_b_dec_to_input", True) else None,
        skip=weights.take("W_skip", 2) if "skip" in architecture else None,
        normalization=_NORMALIZATIONS[config.get("normalize_activations")],
        source=str(folder),
    )
    weights.refuse_rest()
    return dictionary


def _refuse_settings(config: dict[str, Any], file: Path) -> None:
    """Raise RelevanceError for settings under which the dictionary would be another one than is read here."""
    normalization = config.get("normalize_activations")
    if normalization == "expected_average_only_in":
        raise RelevanceError(
            f"{file}: normalize_activations is 'expected_average_only_in', whose factor is not in the files; fold it into the weights "
            "(fold_activation_norm_scaling_factor of SAELens) and save again"
        )
    if normalization not in _NORMALIZATIONS:
        raise RelevanceError(f"{file}: normalize_activations {normalization!r} is not known")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise RelevanceError(f"{file}: reshape_activations {config['reshape_activations']!r} is not known")
    if config.get("hook_head_index") is not None or config.get("hook_point_head_index") is not None:
        raise RelevanceError(f"{file}: the dictionary is for one head alone, which is not supported")
    if config.get("normalize_decoder"):
        raise RelevanceError(f"{file}: normalize_decoder is not supported; fold the norms into the weights and save again")


def _activation(kind: str, config: dict[str, Any], weights: Weights, *, file: Path, n_features: int) -> FeatureActivation:
    named = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    settings = config.get("activation_fn_kwargs") or {}
    if kind == "relu" and named == "topk":  # so older versions write it
        kind = "topk"
    elif named not in ("relu", "topk"):
        raise RelevanceError(f"{file}: the activation function {named!r} is not known; there are relu and topk")
    if kind == "jumprelu":
        return JumpReLU(weights.take("threshold", 1).clamp(min=0))  # theirs is ReLU where x > threshold
    if kind == "batchtopk":
        threshold = weights.take("topk_threshold", 0).clamp(min=0)
        return JumpReLU(threshold.float().expand(n_features))
    if kind == "gated":
        return Gated(weights.take("b_gate", 1), weights.take("b_mag", 1), weights.take("r_mag", 1))
    if kind == "topk":
        k = config.get("k", settings.get("k"))
        if not isinstance(k, int):
            raise RelevanceError(f"{file} does not say how many features TopK keeps (k)")
        return TopK(k)
    return ReLU()
