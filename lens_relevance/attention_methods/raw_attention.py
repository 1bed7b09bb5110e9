"""Raw attention: the last pattern, mean over heads. What a picture of attention shows, and the weakest of baselines."""

from __future__ import annotations

import torch

from lens_relevance.attention_methods.accumulation import Accumulation, Total
from lens_relevance.attention_methods.run import AttentionRun


def accumulate(run: AttentionRun) -> Accumulation:
    """scores = mean over heads of A_L at the explained row; the layers below the last are 0, this method does not see them.

    With two token sets, the last attention that the explained set pays to each of them.
    """
    last = {one.sources: layer for layer, one in enumerate(run.attentions) if one.queries == run.explained_set}
    maps = []
    for layer in range(run.n_layers):
        pattern = run.pattern(layer)
        maps.append(pattern / pattern.shape[1] if layer in last.values() else torch.zeros_like(pattern))
    return Total(maps, run.start)
