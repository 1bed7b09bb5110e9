"""What makes a result repeatable: the model, the question, the rules, and the versions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens_relevance._version import __version__
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.targets import Target, describe
from lens_relevance.ruleset_tables import Table, ruleset_name

_version = cache(version)  # which looks through the folder of every installed package


def name_of(model: HookedModel) -> str:
    """What a model is called; one from a folder by the folder's name, not by its whole path."""
    name = str(getattr(getattr(model, "cfg", None), "model_name", type(model).__name__))
    return Path(name).name if Path(name).is_dir() else name


def provenance(model: HookedModel, rules: str | Table, target: Target, *, reference: Any, logits: Tensor) -> dict[str, str]:
    """Names and versions in words, by what they are of."""
    return {
        "model": name_of(model),
        "architecture": str(getattr(getattr(model, "cfg", None), "architecture", type(model).__name__)),
        "dtype": str(logits.dtype).removeprefix("torch."),
        "ruleset": ruleset_name(rules),
        "target": describe(target, model),
        "reference": "none" if reference is None else ("given inputs" if isinstance(reference, Tensor | Mapping) else str(reference)),
        "lens_relevance": __version__,
        "transformer_lens": _version("transformer-lens"),
        "torch": str(torch.__version__),
    }
