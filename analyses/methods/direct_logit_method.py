"""Direct logit attribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.methods.base import Estimator, Scores, activations, collect, points
from analyses.models.structure import n_layers
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, propagate
from lens_relevance.rules import LNRule


def direct_logit_attribution() -> Estimator:
    """What each component writes straight into the target, past all later layers (the logit-lens view; nostalgebraist 2020).

    (a_clean - a_corrupt) . g_final at the component's own position, g_final the gradient at the final residual with the norm's scale held
    constant. Components that act through later ones get next to nothing: that is the point of showing it beside the others.

    Raises:
        RelevanceError: heads are asked for, and the model normalises what they write.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        final = COMPONENTS["resid_post"].read_at(n_layers(model) - 1)
        cache = propagate(
            model, pairs.corrupt, pairs.target, rules={"norm": LNRule()}, names_filter=final, attention_mask=pairs.corrupt_mask
        )
        g, names = cache.coefficients[cache.canonical(final)], points(model, components)
        clean, corrupt = activations(model, pairs.clean, names, pairs=pairs), activations(model, pairs.corrupt, names, pairs=pairs)

        def written(point: str) -> Tensor:
            change = clean[point] - corrupt[point]
            here = g.to(change)  # layers may be on several devices
            if change.ndim == 3:
                return change * here
            block = model.blocks[int(point.split(".")[1])]
            if hasattr(block, "ln1_post"):
                raise RelevanceError("this model normalises what its heads write (ln1_post): choose a ruleset to score its heads")
            return change * torch.einsum("bpm,hdm->bphd", here, block.attn.W_O.detach().to(here))

        return collect(model, components, written)

    return Estimator("direct_logit_attribution", scores, forwards=3, backwards=1, components=("resid", "attn", "mlp", "heads"))
