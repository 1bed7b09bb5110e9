"""LeGrad (Bousselham et al. 2024, arXiv 2404.03214): the positive gradients at the patterns, without the patterns themselves."""

from __future__ import annotations

import torch

from lens_relevance.attention_methods.accumulation import Accumulation, Total
from lens_relevance.attention_methods.run import AttentionRun


def accumulate(run: AttentionRun) -> Accumulation:
    """Per layer the mean over heads and queries of (dA)^+, summed over layers (LeGrad, Bousselham et al. 2024, arXiv 2404.03214).

    Entries that the attention mask closes have a gradient but no path, so they count 0. LeGrad was made for image encoders, which have no
    such entries and a target of their own in every layer; here every layer has the one target.
    """
    maps = []
    for layer in range(run.n_layers):
        gradient, pattern = run.gradient(layer), run.pattern(layer)
        maps.append(torch.where(pattern == 0, torch.zeros_like(gradient), gradient.clamp(min=0)) / gradient.shape[1])
    per_set = [mask.to(run.start.dtype) / mask.sum(1, keepdim=True) for mask in run.masks.values()]
    return Total(maps, torch.cat(per_set, 1))
