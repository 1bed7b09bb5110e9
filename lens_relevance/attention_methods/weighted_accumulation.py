"""Weighted relevance accumulation, our reading of Huang et al. 2023 (arXiv 2308.10240).

Only the paper's abstract was at hand, so its own weights could not be checked: the abstract's idea (tokens before and after attention
differ in importance, and should not be accumulated equally) is the paper's, the weights alpha and beta below are ours (derived here).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.attention_methods.accumulation import Accumulation, Chain, Step
from lens_relevance.attention_methods.chefer_2021b import over_two_sets, positive_relevance
from lens_relevance.attention_methods.run import AttentionRun
from lens_relevance.rules.base import share
from lens_relevance.sites import Anatomy

IMPORTANCES = ("relevance", "norm", "grad_norm", "equal")


def accumulate(run: AttentionRun) -> Accumulation:
    """R = I, then R <- diag(beta) R + diag(alpha) A-bar R in every layer, with alpha_i + beta_i = 2 (two sets: see update_rules.py).

    alpha_i : beta_i = importance of what attention wrote at token i (hook_attn_out) : importance of what was there (resid_pre).
    `importance="equal"` is Chefer 2021b exactly. beta = 2 in every layer makes 2^layers: compare scores within a row only.
    The paper's own weights could not be checked, only its abstract was at hand; this is our reading.
    """
    if len(run.masks) == 2:
        rows = [run.span(one.queries) for one in run.attentions]
        return over_two_sets(run, [(alpha[:, rows[i]], beta[:, rows[i]]) for i in range(run.n_layers) for alpha, beta in [weights(run, i)]])
    chained = []
    for layer, part in enumerate(positive_relevance(run)):
        alpha, beta = weights(run, layer)
        chained.append(Step(beta, alpha[:, None, :, None] * part))
    return Chain(chained, run.start, run.mask)


def points(body: Anatomy, importance: str) -> list[str]:
    """HookPoints that the choice of importance needs."""
    return [] if importance == "equal" else [name for one in body.attentions for name in (one.before, one.written)]


def weights(run: AttentionRun, layer: int) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"]]:
    """alpha and beta of a layer; both 1 where neither side has any importance."""
    if run.importance == "equal":
        ones = torch.ones_like(run.start)
        return ones, ones
    one = run.attentions[layer]
    before, written = run.activation(one.before, one.queries), run.activation(one.written, one.queries)
    g = run.coefficient(one.written, one.queries)
    return balanced(importance_of(written, g, run.importance), importance_of(before, g, run.importance))


def importance_of(
    activation: Float[Tensor, "batch token d_model"], g: Float[Tensor, "batch token d_model"], importance: str
) -> Float[Tensor, "batch token"]:
    """`relevance`: |a . g|; `norm`: the 2-norm of a; `grad_norm`: the 2-norm of a * g, element by element."""
    if importance == "relevance":
        return share(activation, g).sum(-1).abs()
    return (activation if importance == "norm" else share(activation, g)).norm(dim=-1)


def balanced(
    written: Float[Tensor, "batch token"], before: Float[Tensor, "batch token"]
) -> tuple[Float[Tensor, "batch token"], Float[Tensor, "batch token"]]:
    """alpha and beta in the proportion written : before, adding up to 2; (1, 1) where both are 0."""
    total = written + before
    nothing = total == 0
    alpha = torch.where(nothing, torch.ones_like(total), 2 * written / torch.where(nothing, torch.ones_like(total), total))
    return alpha, 2 - alpha
