"""What a model's outputs stand for besides tokens: the classes of a classifier, or the last hidden state of a model without a head."""

from __future__ import annotations

from torch import Tensor

from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel, is_bridge, root


def class_names(model: HookedModel) -> dict[int, str] | None:
    """The classes of a classifier of Hugging Face's; None for a model whose logits are over tokens."""
    original = root(model)
    names = getattr(getattr(original, "config", None), "id2label", None)
    return {int(i): str(name) for i, name in names.items()} if names and hasattr(original, "classifier") else None


def is_headless(model: HookedModel) -> bool:
    """Whether a bridge's output is the last hidden state (BertModel, ViTModel)."""
    return is_bridge(model) and not hasattr(model, "unembed") and class_names(model) is None


def class_number(classes: dict[int, str], given: str | int | Tensor, what: str) -> int:
    """The number of a class given by name or number; raises RelevanceError for one that is not known, or a name of several."""
    if not isinstance(given, str):
        if int(given) in classes:
            return int(given)
        raise RelevanceError(f"{what} {int(given)} is none of the {len(classes)} classes of this model, which count from 0")
    found = [i for i, name in classes.items() if name == given]
    if len(found) == 1:
        return found[0]
    if found:
        raise RelevanceError(f"{what} {given!r} is the name of the classes {found}; give a number")
    like = [repr(name) for name in classes.values() if given.lower() in name.lower()] or [repr(name) for name in classes.values()]
    raise RelevanceError(f"{what} {given!r} is not a class of this model; it knows {', '.join(like[:5])}{' ...' if len(like) > 5 else ''}")
