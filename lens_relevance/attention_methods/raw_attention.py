"""Raw attention: the last layer's pattern, mean over heads. What a picture of attention shows, and the weakest of baselines."""

from __future__ import annotations

import torch

from lens_relevance.attention_methods.accumulation import Accumulation, Total
from lens_relevance.attention_methods.run import AttentionRun


def accumulate(run: AttentionRun) -> Accumulation:
    """scores = mean over heads of A_L at the explained row; the layers below the last are 0, this method does not see them."""
    last = run.pattern(run.n_layers - 1)
    unseen = [torch.zeros_like(last)] * (run.n_layers - 1)
    return Total([*unseen, last / last.shape[1]], run.start)
