"""Chefer et al. 2021a (CVPR, arXiv 2012.09838): gradients at the patterns times LRP relevance of the patterns."""

from __future__ import annotations

import torch

from lens_relevance.attention_methods.accumulation import Accumulation, Chain, Step
from lens_relevance.attention_methods.run import AttentionRun
from lens_relevance.rules.base import share


def accumulate(run: AttentionRun) -> Accumulation:
    """R = product of (I + A-bar), A-bar the mean over heads of (dA * R_A)^+.

    dA is the plain gradient. R_A is the pattern's relevance: by the paper's own rules (`lrp_zplus`, with the sums and the start of
    additions.py), unless another ruleset is named; any but `gradient` takes a second forward and backward. With two token sets the product
    is over the tokens of both (derived here).
    """
    ones, chained = torch.ones_like(run.start), []
    for layer in range(run.n_layers):
        product = share(run.relevance(layer), run.plain_gradient(layer)).clamp(min=0)
        chained.append(Step(ones, product / product.shape[1]))
    return Chain(chained, run.start, run.mask)
