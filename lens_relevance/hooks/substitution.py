"""One passage of a forward through one site: the output with a rule's backward, and the proof that the model goes on with it.

Liveness: the model is handed a view of each captured input. A gradient that arrives at that view has come through the model's own
computation, past the rule: the HookPoint was decorative and the relevance would be wrong. That is an error, raised in the backward itself.
A rule that scales the gradient at the operation's output leaves the rest to the model's own computation; there the gradient that arrives
at the output as the model computed it has to be the one that the rule sent, and nothing besides.
A rule off every path sees no gradient at either place and passes; so does one whose gradient is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lens_relevance.errors import LivenessError
from lens_relevance.rules.base import Reference, Rule
from lens_relevance.sites import Site


class Visit:
    """One passage of a forward through one site: what the backward needs to know besides tensors."""

    __slots__ = ("is_off", "rest", "rule", "sent", "site", "visited")

    def __init__(self, site: Site, rule: Rule) -> None:
        self.site, self.rule, self.visited, self.is_off = site, rule, False, False
        self.sent: Tensor | None = None  # by a rule that scales the gradient at the output, in the backward under way
        self.rest: Tensor | None = None  # what stays behind, per token, where the last backward told

    def refuse_bypass(self, _: Tensor) -> None:
        """Runs when a gradient reaches the operation's input through the model's own computation."""
        if not (self.is_off or (self.rule.on_output and self.visited)):
            raise LivenessError(bypassed(self.site, self.rule))

    def refuse_partial_bypass(self, arrived: Tensor) -> None:
        """Runs when a gradient reaches the operation's output as the model computed it: from the rule, or past it."""
        sent, self.sent = self.sent, None
        if arrived is sent:  # as nearly always: autograd adds what comes from elsewhere into another tensor
            return
        if sent is None or not torch.equal(arrived.nan_to_num(), sent.nan_to_num()):
            raise LivenessError(bypassed(self.site, self.rule))


class Refusal:
    """Raises when a gradient arrives: a forward without a backward needs no rule."""

    def __init__(self, message: str) -> None:
        self.message = message

    def __call__(self, _: Tensor) -> None:
        raise LivenessError(self.message)


def bypassed(site: Site, rule: Rule) -> str:
    """The message for a rule that the model goes past."""
    return (
        f"the rule {rule!r} at {site.name} ({site.points}) was bypassed: the model does not go on with what {site.output_name} returns, "
        "or does so only in part. Declare the site at live HookPoints, or give its operation no rule"
    )


class Substitute(torch.autograd.Function):
    """The output of an operation as it is, with the rule's backward in place of the operation's own."""

    @staticmethod
    def forward(ctx: Any, visit: Visit, reference: Reference | None, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.visit = visit
        ctx.dtypes = [x.dtype for x in inputs]
        plain = output.detach()
        if not visit.rule.on_output:
            ctx.save_for_backward(*visit.rule.keep(visit.site.operation, tuple(x.detach() for x in inputs), plain, reference))
        return plain

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        visit: Visit = ctx.visit
        visit.visited = True
        coefficients, visit.rest = visit.rule.backward_and_rest(visit.site.operation, ctx.saved_tensors, upstream[0])
        if visit.rule.on_output:
            visit.sent = coefficients[0]
            return None, None, coefficients[0]
        downstream = (None if c is None else c.to(t) for c, t in zip(coefficients, ctx.dtypes, strict=True))
        return (None, None, None, *downstream)
