"""Gemma Scope (`params.npz`) and Gemma Scope 2 (`params.safetensors` beside `config.json`): JumpReLU autoencoders and transcoders.

The encoder is stored as [d_in, feature], the decoder as [feature, d_out], and the affine skip connection so that x is multiplied from the
left. Gemma Scope 2 names the Hugging Face modules that it reads and writes; Gemma Scope 1 names nothing, so that its points are given.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lens_relevance.dictionaries.activation import JumpReLU
from lens_relevance.dictionaries.dictionary import Dictionary
from lens_relevance.dictionaries.files import Weights
from lens_relevance.errors import RelevanceError
from lens_relevance.json_files import read_json

_MODULE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")
# What Gemma's modules are in TransformerLens's names, in a block. A norm's output is read with its weight.
_IN_BLOCK = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "ln2.hook_out",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "post_attention_layernorm.output": "hook_attn_out",
}


def read_gemma_scope(path: Path, point_in: str | None, point_out: str | None) -> Dictionary:
    """A dictionary from params.npz or params.safetensors; points that are given go before those that the files name."""
    config_file = path.parent / "config.json"
    config = read_json(config_file, "the configuration of a dictionary") if config_file.exists() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise RelevanceError(f"{config_file}: architecture {config['architecture']!r} is not known, only jump_relu")
    reads = point_in or _named(config, "hf_hook_point_in", config_file)
    if reads is None:
        raise RelevanceError(
            f"{path} does not say which activation it is for: pass point_in= (and point_out= for a transcoder), as in "
            "point_in='blocks.20.hook_resid_post'"
        )
    writes = point_out or (None if point_in else _named(config, "hf_hook_point_out", config_file)) or reads
    weights = Weights(path)
    letter = "W" if "W_enc" in weights else "w"
    skip = weights.take_any("affine_skip_connection")
    dictionary = Dictionary(
        encoder=weights.take(f"{letter}_enc", 2).T.contiguous(),
        encoder_bias=weights.take("b_enc", 1),
        decoder=(weights.take(f"{letter}_dec", 2),),
        decoder_bias=weights.take("b_dec", 1),
        activation=JumpReLU(weights.take("threshold", 1).clamp(min=0)),  # theirs is ReLU where x > threshold
        point_in=reads,
        point_out=(writes,),
        skip=None if skip is None else skip.T.contiguous(),
        source=str(path),
    )
    weights.refuse_rest()
    return dictionary


def _named(config: dict[str, Any], key: str, file: Path) -> str | None:
    """A Hugging Face module's input or output, that a configuration names, as a HookPoint."""
    if key not in config:
        return None
    module = config[key]
    found = _MODULE.fullmatch(module)
    if found is None or found[2] not in _IN_BLOCK:
        raise RelevanceError(
            f"{file} names {module!r}, which is not known here; pass point_in= and point_out= as TransformerLens names them"
        )
    return f"blocks.{found[1]}.{_IN_BLOCK[found[2]]}"
