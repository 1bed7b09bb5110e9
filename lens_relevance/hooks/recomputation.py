"""Steps that a model computes without calling its HookPoints, recomputed at them so that rules apply.

Some attention components run Hugging Face's own module, which hands out its scores and pattern, if at all, when it has gone on without
them. While rules are attached, the steps are recomputed at the HookPoint where the module's result comes out (z): each one fires its own
HookPoint with a tensor that is on the graph, so that rules, taps and TransformerLens's tools find there what they find on any other
attention. The value that the model goes on with stays its own, bit by bit; only its backward is that of the recomputed steps. Where
the two values differ, the component does not compute what its site says, and that is an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lens_relevance.errors import LivenessError, RelevanceError
from lens_relevance.hooks.checks import ForwardCheck, does_not_compute, refuse_mismatch, relative, surely_near
from lens_relevance.sites import Site


class Rebuilding:
    """The sites recomputed at one HookPoint, in order: each one's inputs are tensors that passed its input HookPoints before."""

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self.running = False
        self.check: ForwardCheck | None = None
        self._fed: dict[HookPoint, Tensor] = {}

    def add(self, site: Site) -> None:
        self.sites.append(site)

    def feed(self, point: HookPoint, x: Tensor) -> None:
        """A tensor as it left an input HookPoint."""
        self._fed[point] = x

    def run(self, result: Tensor) -> Tensor:
        """The model's own result, with the backward of the recomputed steps."""
        self.running = True
        try:
            for site in self.sites:
                if any(point not in self._fed for point in site.inputs):
                    missing = ", ".join(str(p.name) for p in site.inputs if p not in self._fed)
                    raise LivenessError(f"{site.output_name} was reached without {missing}, so {site.name} cannot be recomputed")
                value = site.operation(*(self._fed[point] for point in site.inputs))
                if site.output is site.rebuilt:
                    self._compare(site, result.detach(), value.detach())
                    return _InPlaceOf.apply(value, result.detach()) if value.requires_grad else result
                assert site.output is not None
                site.output(value)
        finally:
            self.running = False
            self._fed.clear()
        return result

    def _compare(self, site: Site, result: Tensor, value: Tensor) -> None:
        if self.check is None:
            check_value(site, result, value)
            return
        off = _off(result, value)
        for each in self.sites:
            self.check.note(each.name, off, result.dtype, does_not_compute(site))

    def refuse_edit(self, point: HookPoint, given: Tensor, passed: Any) -> None:
        """What a hook changes here would not reach the model, which has its own."""
        if passed is not given and not (isinstance(passed, Tensor) and torch.equal(passed, given)):
            raise RelevanceError(
                f"a hook edits {point.name}, which this model does not read: the edit would be lost. Edit q, k, v or z instead"
            )


class _InPlaceOf(torch.autograd.Function):
    """The second tensor's value with the first one's graph."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = graph.dtype
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return upstream[0].to(ctx.dtype), None


def check_value(site: Site, result: Tensor, value: Tensor) -> None:
    """Refuse a component whose result is not what its site says."""
    result, value = result.detach(), value.detach().reshape(result.shape)
    if not surely_near(result, value):
        refuse_mismatch(_off(result, value), result.dtype, does_not_compute(site))


def _off(result: Tensor, value: Tensor) -> float:
    """By how much a result differs; rows that see nothing (padding), or hold nothing finite, do not matter."""
    seen = (value.reshape(result.shape) != 0) & result.isfinite()
    return relative(result - value.reshape(result.shape), seen, torch.where(seen, result.abs(), 0.0).amax(-1, keepdim=True))
