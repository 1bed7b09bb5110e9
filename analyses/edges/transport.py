"""Carries coefficients back through a norm, and contributions forward through one, for many readers or writers at once.

`pull` applies a rule's backward to coefficients with leading dimensions (every head's q, k and v). `push` is its transpose: the part of a
norm's output that the rule gives each of the vectors whose sum the norm read (heads before a post-norm).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.rules import PairNorm, Reference, Rule
from lens_relevance.rules.base import working
from lens_relevance.sites import Site


def pull(
    site: Site | None, rule: Rule, x: Tensor, *, reference: Tensor | None, upstream: Float[Tensor, "*lead d"]
) -> Float[Tensor, "*lead d"]:
    """Coefficients at a norm's input from those at its output, under a rule.

    Args:
        site: the norm; None hands coefficients on.
        x: the norm's input.
        reference: the norm's input in the other run, where there is one.
        upstream: coefficients at its output.
    """
    if site is None:
        return upstream
    x = working(x)
    if rule.on_output:
        (scaled,) = rule.backward(site.operation, (), upstream)
        assert scaled is not None
        return pull(site, Rule(), x, reference=None, upstream=scaled)
    if rule.is_plain:  # the pair form of two equal runs is the gradient
        rule, reference = PairNorm(), x
    coefficient = rule.backward(site.operation, _keep(site, rule, x, reference), upstream)[0]
    assert coefficient is not None
    return coefficient


def push(
    site: Site | None, rule: Rule, x: Tensor, *, reference: Tensor | None, parts: Float[Tensor, "*lead d"]
) -> Float[Tensor, "*lead d"]:
    """What a norm makes of parts of its input (their differences, between two runs) under a rule: the transpose of `pull`.

    As `pull` is linear in the coefficients, its transpose is its own derivative along them.
    """
    if site is None:
        return parts
    with torch.enable_grad():
        if rule.is_plain:  # the transpose of the gradient is the directional derivative
            tangents = torch.func.jvp(site.operation, (working(x).expand_as(parts).contiguous(),), (parts,))
            return tangents[1].detach()
        upstream = torch.zeros_like(parts).requires_grad_(True)
        return torch.autograd.grad(pull(site, rule, x, reference=reference, upstream=upstream), upstream, parts)[0]


def _keep(site: Site, rule: Rule, x: Tensor, reference: Tensor | None) -> tuple[Tensor, ...]:
    unused = x.new_empty(0)  # what the norm's output would be, which no rule of norms looks at
    return rule.keep(site.operation, (x,), unused, None if reference is None else Reference((working(reference),), unused))
