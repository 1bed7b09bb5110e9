"""Methods that score the tokens of single prompts (or the patches of pictures), example by example, and no components of pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from analyses.methods.base import Estimator, Scores
from analyses.methods.single_inputs import SingleInput, single_inputs
from analyses.tasks import PromptPairs
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.model_state import check_model, frozen, left_as_found


def tokens_only(
    name: str, scores: Callable[[HookedModel, SingleInput], Tensor], *, forwards: int, backwards: int, per_token: int = 0
) -> Estimator:
    """The method as an Estimator.

    Args:
        name: what it is called in tables.
        scores: (model, one example) -> the scores of its tokens or patches.
        forwards, backwards: passes over each example.
        per_token: forward passes besides, for each token or patch.
    """

    @left_as_found
    def tokens(
        model: HookedModel,
        inputs: Any,
        target: Any,
        *,
        attention_mask: Tensor | None = None,
        reference: Any = None,
        stack: str | None = None,
    ) -> Tensor:
        check_model(model)
        with frozen(model), torch.enable_grad():
            found = single_inputs(model, inputs, target, attention_mask=attention_mask, reference=reference, stack=stack)
            return torch.stack([scores(model, one).detach() for one in found])

    def no_components(model: Any, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        return {}

    return Estimator(name, no_components, forwards, backwards, components=(), single_run=True, tokens=tokens, per_token=per_token)
