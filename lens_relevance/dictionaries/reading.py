"""Dictionaries from files, in the formats that are in use. Weights are read from safetensors and npz alone, which hold no code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lens_relevance.dictionaries.circuit_tracer import is_circuit_tracer, read_circuit_tracer
from lens_relevance.dictionaries.dictionary import Dictionary
from lens_relevance.dictionaries.gemma_scope import read_gemma_scope
from lens_relevance.dictionaries.saelens import CONFIG, WEIGHTS, read_saelens
from lens_relevance.errors import RelevanceError

_GEMMA_SCOPE = ("params.safetensors", "params.npz")


def read_dictionary(path: str | Path, *, point_in: str | None = None, point_out: str | None = None) -> Dictionary:
    """One sparse autoencoder or transcoder.

    Args:
        path: A folder of SAELens (cfg.json, sae_weights.safetensors), or a folder or file of Gemma Scope (params.npz) or Gemma Scope 2
            (params.safetensors, config.json).
        point_in: HookPoint that it reads, where the files do not name it, or name one that this version of TransformerLens does not have.
        point_out: HookPoint that it writes to, for transcoders.

    Raises:
        RelevanceError: There is no dictionary, it is of another format, or a name or shape in it does not fit.
    """
    path = Path(path)
    if not path.exists():
        raise RelevanceError(f"{path} does not exist; give the folder or file of a dictionary that is on this machine")
    if path.is_file():
        if path.name == WEIGHTS:
            return read_saelens(path.parent, point_in, point_out)
        if path.suffix in (".npz", ".safetensors"):
            return read_gemma_scope(path, point_in, point_out)
        raise RelevanceError(f"{path} is neither .safetensors nor .npz; other formats can run code when they are read")
    if (path / CONFIG).exists() and (path / WEIGHTS).exists():
        return read_saelens(path, point_in, point_out)
    for name in _GEMMA_SCOPE:
        if (path / name).exists():
            return read_gemma_scope(path / name, point_in, point_out)
    if is_circuit_tracer(path):
        raise RelevanceError(f"{path} holds transcoders of several layers; use read_dictionaries")
    raise RelevanceError(
        f"{path} holds no dictionary of a known format: {CONFIG} with {WEIGHTS} (SAELens), {' or '.join(_GEMMA_SCOPE)} (Gemma Scope), "
        "layer_0.safetensors or W_enc_0.safetensors, ... (circuit-tracer)"
    )


def read_dictionaries(path: str | Path, *, layers: Sequence[int] | None = None) -> list[Dictionary]:
    """All dictionaries of a folder: the transcoders of several layers that circuit-tracer writes (layer_0.safetensors ..., or a
    cross-layer transcoder's files), or the one that `read_dictionary` reads.

    layers: Read these alone; for folders of several.

    Raises:
        RelevanceError: As `read_dictionary` does; layers of a single dictionary.
    """
    path = Path(path)
    if path.is_dir() and is_circuit_tracer(path):
        return read_circuit_tracer(path, layers)
    if layers is not None:
        raise RelevanceError(f"{path} is no folder of layer_0.safetensors or W_enc_0.safetensors, ..., of which layers could be chosen")
    return [read_dictionary(path)]
