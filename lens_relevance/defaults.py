"""What `propagate` does where no ruleset, or no reference, is named."""

from __future__ import annotations

from typing import Any

from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.prompt import Prompt
from lens_relevance.inputs.references import mean_embedding
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset
from lens_relevance.sites.embeddings import token_embedding


def with_defaults(model: HookedModel, prompt: Prompt, rules: str | Table | None, *, reference: Any) -> tuple[str | Table, Any]:
    """The ruleset and the reference of a run.

    A ruleset that compares two runs and has no counterpart compares with `mean_embedding()`. Where none is named it is `deeplift`:
    docs/measurements/single_prompts.md gives the reason. Inputs that are not tokens alone (an image, speech) have no mean to be compared
    with, and are explained by `attnlrp`.
    """
    if rules is None:
        rules = "deeplift" if reference is not None or _is_tokens_alone(model, prompt) else "attnlrp"
    if reference is None and needs_reference(ruleset(rules)) and _is_tokens_alone(model, prompt):
        reference = mean_embedding()
    return rules, reference


def _is_tokens_alone(model: HookedModel, prompt: Prompt) -> bool:
    """Whether the model is called with token ids, and nothing else but masks and numbers of positions or kinds, and embeds them itself."""
    read = bool(prompt.ids) and not any(value.is_floating_point() for name, value in prompt.arguments.items() if "mask" not in name)
    return read and all(token_embedding(model, stack) is not None for stack in prompt.ids)
