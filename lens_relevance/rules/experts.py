"""Mixture of experts: y = sum over the chosen experts of router weight * expert(x), from the MLP's input to its output.

The experts are one batched module behind no HookPoint, so the whole is recomputed. Tokens are taken expert by expert, as the model does.
Three rules of a ruleset meet here and each is called: `activation` and `gate` inside every expert, `router` on the product of router weight
(first factor) and expert. The router's softmax passes its gradient, or, where the router's rule compares with a reference run, its pair
form, where both runs chose the same experts; a sigmoid router (DeepSeek-V3) is the softmax of log sigmoid(score), and log sigmoid passes by
its gradient or the rescale rule.

Where two runs choose different experts for a token the change of its router weights is not a function of small steps of its scores: that
share is the sink `router` of the account, and with it the account is exact. Biases of experts and router keep their share there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from lens_relevance.errors import LivenessError
from lens_relevance.rules.activation import derivative, rescale_factor
from lens_relevance.rules.base import (
    Coefficients,
    Kept,
    Operation,
    Output,
    PerExample,
    Reference,
    Rule,
    Tensors,
    nothing_kept,
    per_example,
    share,
    working,
)
from lens_relevance.rules.expert_weights import Expert, Router
from lens_relevance.rules.gated import GatedActivation, GatedRule
from lens_relevance.rules.product import ProductRule, product
from lens_relevance.rules.softmax import logarithmic_mean, pull_back

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # models compute router weights in fp32 whatever their dtype


class Experts(Operation):
    """x -> sum over the chosen experts of router weight * expert(x), plus shared(x).

    expert(e): the weights of the e-th of n experts (taken when needed: views of a batched tensor). gated: the activation of them all.
    """

    kind = "experts"
    column = "router"

    def __init__(
        self, router: Router, expert: Callable[[int], Expert], n: int, *, gated: GatedActivation, shared: Expert | None = None
    ) -> None:
        self.router, self.expert, self.n, self.gated, self.shared = router, expert, n, gated, shared

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.gated.parts, "router")

    def compose(self, rules: Mapping[str, Rule]) -> ExpertsRule:
        return ExpertsRule(self.gated.compose(rules), product(rules["router"]))

    @property
    def has_biases(self) -> bool:
        one = self.expert(0)
        return any(bias is not None for bias in (self.router.bias, one.gate_bias, one.up_bias, one.down_bias))

    def flat(self, x: Float[Tensor, "*token d_model"]) -> Float[Tensor, "token d_model"]:
        """One row per token."""
        return working(x).flatten(0, -2)

    def chosen(self, x: Float[Tensor, "*token d_model"]) -> Bool[Tensor, "token expert"]:
        """By the model's own router, on the tensor as the model has it: rounding must not decide differently here."""
        return self.router.chosen(x.flatten(0, -2))

    def outs(self, x: Float[Tensor, "token d_model"], expert: Expert) -> Float[Tensor, "token d_model"]:
        """What an expert makes of each token."""
        return expert.out(self.gated(*expert.parts(x)))

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        x, chosen = self.flat(inputs[0]), self.chosen(inputs[0])
        weights = self.router.weights(self.router.logits(self.router.scores(x), chosen), chosen)
        y = torch.stack([weights[:, e : e + 1] * self.outs(x, self.expert(e)) for e in range(self.n)]).sum(0)
        if self.shared is not None:
            y = y + self.outs(x, self.shared)
        return y.reshape(inputs[0].shape)

    def along(self, direction: Float[Tensor, " d_out"], *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_token"]:
        """Expert by expert, on the tokens that chose it."""
        x, chosen = self.flat(inputs[0]), self.chosen(inputs[0])
        weights = self.router.weights(self.router.logits(self.router.scores(x), chosen), chosen)
        y = torch.zeros_like(x[:, 0])
        for e in range(self.n):
            tokens = chosen[:, e].nonzero().flatten()
            y.index_add_(0, tokens, weights[tokens, e] * self._expert_along(direction, x[tokens], self.expert(e)))
        if self.shared is not None:
            y = y + self._expert_along(direction, x, self.shared)
        return y.reshape(inputs[0].shape[:-1])

    def _expert_along(self, direction: Tensor, x: Float[Tensor, "token d_model"], expert: Expert) -> Float[Tensor, " token"]:
        y = self.gated(*expert.parts(x)) @ (direction @ expert.down.to(x.dtype))
        return y if expert.down_bias is None else y + expert.down_bias.to(x.dtype) @ direction


class _Routed(NamedTuple):
    """What is kept of one expert: the tokens that any run sends to it, and for those

    weight: what stands for the router's weight, [tokens, 1], or [tokens, d_model] where a rule has it so.
    out: what stands for the expert's output in the weight's coefficient, as neurons or, for a rule that is not linear, as that output.
    bias: by how much the down projection's bias counts in it.
    to_gate, to_up: from the coefficients at the neurons to those at gate and up.
    """

    tokens: Int[Tensor, " token"]
    weight: Float[Tensor, "token d"]
    out: Float[Tensor, "token d_out"]
    bias: Float[Tensor, "token 1"]
    to_gate: Float[Tensor, "token d_expert"]
    to_up: Float[Tensor, "token d_expert"]


class ExpertsRule(Rule):
    """How relevance passes the experts, and how it passes the product of router weight and expert.

    Source: ours; the rules that it calls have sources of their own.
    """

    def __init__(self, gated: GatedRule, router: ProductRule) -> None:
        self.gated, self.router = gated, router

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.gated.needs_reference or self.router.needs_reference

    @property
    def is_plain(self) -> bool:
        return self.gated.is_plain and self.router.is_plain

    @property
    def is_exact(self) -> bool:
        return self.gated.is_exact and self.router.is_exact

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        """Two factors from router weights to router scores, the change of the weights of tokens whose experts differ between the runs, then
        those of `_Routed` per expert, then two of the shared expert."""
        assert isinstance(op, Experts)
        x, other = op.flat(inputs[0]), None if reference is None or not self.needs_reference else op.flat(reference.inputs[0])
        chosen = op.chosen(inputs[0])
        scores = op.router.scores(x)
        logits = op.router.logits(scores, chosen)
        weights, used, pull, slope = op.router.weights(logits, chosen), chosen, logits.softmax(-1), torch.ones_like(scores)
        if op.router.sigmoid:
            slope = derivative(logsigmoid, scores)
        other_weights, change = None, scores.new_zeros(())
        if self.router.needs_reference:
            assert reference is not None and other is not None
            scores2, chosen2 = op.router.scores(other), op.chosen(reference.inputs[0])
            logits2 = op.router.logits(scores2, chosen2)
            other_weights, used = op.router.weights(logits2, chosen2), chosen | chosen2
            same = (chosen == chosen2).all(-1, keepdim=True)
            change = (weights - other_weights) * ~same
            pull = logarithmic_mean(logits.masked_fill(~same, 0.0), logits2.masked_fill(~same, 0.0)) * same
            if op.router.sigmoid:
                slope = rescale_factor(logsigmoid, scores, logsigmoid(scores), x2=scores2, y2=logsigmoid(scores2))
        check = _Check(x)
        kept = [pull * op.router.scale, slope, change]
        for e in range(op.n):
            expert, tokens = op.expert(e), used[:, e].nonzero().flatten()
            own, others = expert.parts(x[tokens]), None if other is None else expert.parts(other[tokens])
            weight, other_weight = (None if w is None else w[tokens, e].unsqueeze(-1) for w in (weights, other_weights))
            assert weight is not None
            neurons = op.gated(*own)
            check.add(tokens, weight.squeeze(-1), neurons, expert)
            standing = self._standing(op, expert, weight, neurons, other_weight, others)
            kept += _Routed(tokens, *standing, *self.gated.passed(op.gated, own, others))
        if op.shared is not None:
            own, others = op.shared.parts(x), None if other is None else op.shared.parts(other)
            check.add(torch.arange(len(x), device=x.device), x.new_ones(len(x)), op.gated(*own), op.shared)
            kept += self.gated.passed(op.gated, own, others)
        check.compare(output)
        return tuple(kept)

    def _standing(
        self, op: Experts, expert: Expert, weight: Tensor, neurons: Tensor, other_weight: Tensor | None, others: Tensors | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What stands for the weight, for the expert's output in the weight's coefficient, and how its bias counts in that."""
        b, one = neurons if self.router.factors_linear else expert.out(neurons), torch.ones_like(weight)
        other = other_one = None
        if other_weight is not None:
            assert others is not None
            other_b = op.gated(*others)
            other = other_weight, other_b if self.router.factors_linear else expert.out(other_b)
            other_one = other_weight, one
        for_out, for_weight = self.router.factors_at(weight, b, other)
        if not self.router.factors_linear:
            return for_weight, for_out, torch.zeros_like(weight)
        return for_weight, for_out, self.router.factors_at(weight, one, other_one)[0]

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        return self.backward_and_rest(op, kept, upstream)[0]

    def backward_and_rest(
        self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]
    ) -> tuple[Coefficients, Float[Tensor, "*lead token"] | None]:
        """The share of a changed choice is the change of the weights times their coefficients, which are at hand here."""
        assert isinstance(op, Experts)
        g = working(upstream).flatten(-3, -2)
        to_x = torch.zeros_like(g)
        to_weights = g.new_zeros((*g.shape[:-1], op.n))
        width = len(_Routed._fields)
        for e in range(op.n):
            routed = _Routed(*kept[3 + width * e : 3 + width * (e + 1)])
            if not len(routed.tokens):
                continue
            expert, here = op.expert(e), g[..., routed.tokens, :]
            if self.router.factors_linear:  # the expert's output against g, without computing that output
                to_neurons = here @ expert.down.to(g.dtype)
                if not self.router.holds_first:
                    along = (to_neurons * routed.out).sum(-1)
                    to_weights[..., routed.tokens, e] = along + _along(here, expert.down_bias) * routed.bias.squeeze(-1)
                to_neurons = to_neurons * routed.weight
            else:
                to_weights[..., routed.tokens, e] = (here * routed.out).sum(-1)
                to_neurons = (here * routed.weight) @ expert.down.to(g.dtype)
            to_x.index_add_(-2, routed.tokens, _through(expert, to_neurons, routed.to_gate, routed.to_up))
        if op.shared is not None:
            to_x = to_x + _through(op.shared, g @ op.shared.down.to(g.dtype), *kept[-2:])
        if not self.router.holds_first:
            to_x = to_x + (pull_back(kept[0], to_weights) * kept[1]) @ op.router.weight.to(g.dtype)
        rest = (kept[2] * to_weights).sum(-1) if self.is_exact else None
        return (to_x.reshape(upstream.shape),), rest

    def sink(self, op: Operation, inputs: Tensors, output: Output, reference: Reference | None, upstream: Output) -> PerExample:
        assert isinstance(op, Experts)
        if reference is None:
            if self.router.holds_first and self.router.factors_conserve and self.gated.conserves(op.gated) and not op.has_biases:
                return nothing_kept(upstream)
        elif self.is_exact:
            return per_example(share(_changed_choice(op, inputs[0], reference.inputs[0]), upstream))
        return super().sink(op, inputs, output, reference, upstream)


def _along(g: Tensor, bias: Tensor | None) -> Tensor | float:
    """g . bias, token by token."""
    return 0.0 if bias is None else g @ bias.to(g.dtype)


def _through(expert: Expert, to_neurons: Tensor, to_gate: Tensor, to_up: Tensor) -> Tensor:
    """Coefficients at an expert's input from those at its neurons."""
    return (to_neurons * to_gate) @ expert.gate.to(to_neurons.dtype) + (to_neurons * to_up) @ expert.up.to(to_neurons.dtype)


def _changed_choice(op: Experts, one: Tensor, two: Tensor) -> Tensor:
    """What the change of router weights does at tokens whose experts differ between the runs: mean(expert) * d(weight)."""
    x1, x2, c1, c2 = op.flat(one), op.flat(two), op.chosen(one), op.chosen(two)
    w1, w2 = (op.router.weights(op.router.logits(op.router.scores(x), c), c) for x, c in ((x1, c1), (x2, c2)))
    change = (w1 - w2) * (c1 != c2).any(-1, keepdim=True)
    total = torch.zeros_like(x1)
    for e in range(op.n):
        tokens = (change[:, e] != 0).nonzero().flatten()
        means = (op.outs(x1[tokens], op.expert(e)) + op.outs(x2[tokens], op.expert(e))) / 2
        total.index_add_(0, tokens, change[tokens, e : e + 1] * means)
    return total.reshape(one.shape)


class _Check:
    """Whether the recomputed experts are what the model computed, by the projection of both on one direction.

    That costs a matrix times a vector per expert, where comparing the outputs themselves would cost half a forward. It notices another
    choice of experts, router weights that a hook has edited, and a version of the model that computes something else.
    """

    def __init__(self, x: Float[Tensor, "token d_model"]) -> None:
        self.direction = torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype, device=x.device).cos()
        self.expected = torch.zeros_like(x[:, 0])

    def add(self, tokens: Tensor, weight: Float[Tensor, " token"], neurons: Float[Tensor, "token d_expert"], expert: Expert) -> None:
        along = neurons @ (self.direction @ expert.down.to(neurons.dtype)) + _along(self.direction, expert.down_bias)
        self.expected.index_add_(0, tokens, weight * along)

    def compare(self, output: Tensor) -> None:
        y = working(output).flatten(0, -2)
        allowed = _TOLERANCE.get(output.dtype, 5e-2) * float(self.direction.norm() * y.norm(dim=-1).max())
        worst = float((y @ self.direction - self.expected).abs().max())
        if worst > allowed:
            raise LivenessError(
                f"a mixture of experts does not compute what its site says: recomputed, it differs by {worst:.2g}. A hook may have edited "
                "its router's weights or choice, which its rule cannot follow; or transformers computes it in a way that is not known yet"
            )
