"""A rule placed on a site: what it captures at the input HookPoints, and the output that it substitutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lens_relevance.errors import LivenessError, RelevanceError
from lens_relevance.hooks.substitution import Substitute, Visit
from lens_relevance.rules.base import Reference, Rule
from lens_relevance.rules.normalization import passes_steps
from lens_relevance.sites import Site

if TYPE_CHECKING:
    from lens_relevance.hooks.session import Session


class PlacedRule:
    """A rule placed on a site, with what is in flight between its input and output HookPoints."""

    def __init__(self, site: Site, rule: Rule, session: Session) -> None:
        self.site, self.rule, self.session = site, rule, session
        self.visit: Visit | None = None  # under way
        self.last: Visit | None = None
        self.captured: dict[int, Tensor] = {}
        self.fired = 0
        self.node: Node | None = None
        self.recorded: list[Reference] = []

    @property
    def active(self) -> bool:
        """A reference run is recorded for every form of a site: which one the run itself will use is not known yet."""
        return self.session.recording or self.site.enabled(self.rule) or self.site.considered(self.rule)

    def reset(self) -> None:
        self.visit, self.last, self.captured, self.fired, self.node = None, None, {}, 0, None

    def forget(self) -> None:
        """Let go of what the last passage left, the reference run's tensors among it."""
        self.reset()
        self.recorded.clear()

    def capture(self, index: int, x: Tensor) -> Visit | None:
        """Take an input; gives the visit that a marker on it has to tell, if one is needed."""
        if index in self.captured:
            raise LivenessError(
                f"{self.site.inputs[index].name} fired twice before {self.site.output_name} did, so the rule at {self.site.name} "
                "cannot tell which call it belongs to; declare a site per call, or leave it out with strict=False"
            )
        self.captured[index] = x
        if self.session.recording or not (torch.is_grad_enabled() and x.requires_grad):
            return None
        self.visit = self.visit or Visit(self.site, self.rule)
        return self.visit

    def substitute(self, output: Tensor) -> Tensor:
        inputs, visit = self.captured, self.visit
        self.captured, self.visit, self.last = {}, None, visit
        inner = self.site.inner
        if inner is not None and self.site.output not in inner.points and not self.session.recording:
            if inner.is_edited and not passes_steps(self.rule):
                raise RelevanceError(
                    f"a hook edits {' or '.join(str(p.name) for p in inner.points)}, and the rule {self.rule!r} at {self.site.name} knows "
                    "the operation as a whole alone: derive it from NormRule, and it is asked for each step, or leave out the hook"
                )
            if not self.site.enabled(self.rule):  # the steps stand in for it
                if visit is not None:
                    visit.is_off = True
                return output
        self.fired += 1
        if len(inputs) < len(self.site.inputs):
            missing = [str(p.name) for i, p in enumerate(self.site.inputs) if i not in inputs]
            raise LivenessError(
                f"{self.site.output_name} fired without {', '.join(missing)}, so the rule at {self.site.name} has no inputs"
            )
        ordered = tuple(inputs[i] for i in range(len(self.site.inputs)))
        if self.session.recording:
            if self.rule.needs_reference:
                self.recorded.append(Reference(tuple(x.detach() for x in ordered), output.detach()))
            return output
        if visit is None:  # nothing differentiable comes in
            return output
        if self.rule.on_output:
            if output.requires_grad:
                output.register_hook(visit.refuse_partial_bypass)
            ruled: Tensor = Substitute.apply(visit, None, output)
        else:
            ruled = Substitute.apply(visit, self._reference(ordered), output.detach(), *ordered)
        self.node = ruled.grad_fn
        return ruled

    def _reference(self, inputs: tuple[Tensor, ...]) -> Reference | None:
        if not self.rule.needs_reference:
            return None
        if len(self.recorded) < self.fired:
            raise RelevanceError(
                f"the reference run did not pass {self.site.name}; give attach or propagate a reference that runs the whole model"
            )
        reference = self.recorded[self.fired - 1]
        for mine, its in zip(inputs, reference.inputs, strict=True):
            if mine.shape[-2:] != its.shape[-2:] or mine.shape[0] % its.shape[0]:
                raise RelevanceError(
                    f"the run and its reference differ in shape at {self.site.name} ({tuple(mine.shape)} against {tuple(its.shape)}); "
                    "pass a reference of the same number of tokens and rows"
                )
        return reference
