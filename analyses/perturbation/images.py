"""Perturbation tests of attributions on pictures: image classifiers, and models that read a picture beside something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from analyses.methods import Estimator
from analyses.perturbation.attributions import token_scores
from analyses.perturbation.curves import curves_of, named_methods
from analyses.perturbation.inputs import PatchRemoval, fillers
from analyses.perturbation.removal_runs import one_by_one
from lens_relevance import RelevanceError, Target
from lens_relevance.hooked_model import HookedModel
from lens_relevance.inputs.prompt import read_inputs
from lens_relevance.inputs.targets import AnyTarget, as_target, top_prediction

ImageAttribution = Callable[[Any, Mapping[str, Shaped[Tensor, "*_input"]], Target], Float[Tensor, "batch patch"]]


def image_curves(
    model: HookedModel,
    inputs: Float[Tensor, "batch channel height width"] | Mapping[str, Shaped[Tensor, "*_input"]],
    target: AnyTarget | None = None,
    *,
    methods: Sequence[str | Estimator] | Mapping[str, str | Estimator | ImageAttribution] = ("attnlrp",),
    baselines: Sequence[str] = ("mean_patch",),
    image: str = "pixel_values",
    patch: int = 16,
    stack: str | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """MoRF and LeRF curves of patches, of each method with each baseline, and of a random order on the same pictures.

    Args:
        inputs, target: as for `propagate`; without a target each picture's top class is explained against the next.
        methods: rulesets (pair rules against the picture of its own mean patch), methods of token relevance, `occlusion`, Estimators, or
            name -> one of these or a callable (model, inputs, target) -> [batch, patch].
        baselines: of `PATCH_BASELINES`.
        image: the argument that holds the pictures [batch, channel, height, width].
        patch: the side of a patch in pixels.
        stack: the token set of the patches, where there are several.
        steps: in how many steps all patches go; None for one by one.
        seed: of the random order.

    Returns:
        The DataFrame that `perturbation_curves` gives for prompts; `areas` and `summary` condense it.

    Raises:
        RelevanceError: as `perturbation_curves`.
    """
    given: Mapping[str, Tensor] = inputs if isinstance(inputs, Mapping) else {image: inputs}
    named = named_methods(methods)
    prompt = read_inputs(model, given)
    if target is None:
        with torch.no_grad():
            logits = prompt.call(model)
        positions = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)
        resolved: Target = top_prediction(logits.reshape(len(logits), -1, logits.shape[-1])[:, -1:], positions, None)
    else:
        resolved = as_target(target)
    removals = [PatchRemoval(model, given, resolved, baseline=baseline, image=image, patch=patch) for baseline in baselines]
    if not removals or not named:
        raise RelevanceError("give at least one method and one baseline")
    everything = torch.ones(len(prompt.tokens), removals[0].n_patches, dtype=torch.bool)
    blank = {**given, image: fillers(given[image], "mean_patch", patch)}
    scores = {"random": torch.rand(everything.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)}
    for name, method in named.items():
        if method == "occlusion":
            scores[name] = one_by_one(removals[0], everything)
        elif isinstance(method, str | Estimator):
            of_tokens = token_scores(method)(model, given, resolved, reference=blank, stack=stack)
            scores[name] = of_tokens[:, -everything.shape[1] :]  # a class token stands before the patches
        else:
            scores[name] = method(model, given, resolved)
    return curves_of(scores, everything, removals, steps=steps)
