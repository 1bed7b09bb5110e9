"""Mixture of experts: y = sum over the chosen experts of router weight * expert(x), from the MLP's input to its output.

The experts are one batched module behind no HookPoint, so the whole is recomputed. Tokens are taken expert by expert, as the model does.

| part | choice | backward | source |
|---|---|---|---|
| router weight * expert | half | half of the gradient to each factor | AttnLRP (2402.05602) eq. 7 |
| router weight * expert | constant | the router weight is a constant | derived here, as CP-LRP holds gates constant |
| router weight * expert | pair | mean of the two runs' values of the other factor | derived here |
| router softmax | gradient / pair | as for attention; between two runs only where both chose the same experts | |
| sigmoid router (DeepSeek-V3) | gradient / pair | softmax of log sigmoid(score); log sigmoid by its gradient / the rescale rule | |

Where two runs choose different experts for a token the change of its router weights is not a function of small steps of its scores: that
share is the sink `router` of the account, and with it the account is exact. Biases of experts and router keep their share there too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.errors import LivenessError
from lens_relevance.rules.activation import Gated, derivative, rescale_factor
from lens_relevance.rules.base import Coefficients, Operation, Reference, Rule, Tensors, balance, per_example, share, working
from lens_relevance.rules.clamped_gate import gate_factors
from lens_relevance.rules.experts import Expert, Experts
from lens_relevance.rules.softmax import logarithmic_mean, pull_back

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}  # models compute router weights in fp32 whatever their dtype
_PER_EXPERT = 5


class ExpertsRule(Rule):
    """How relevance passes the experts (a `Gated` rule each) and the router ("gradient", "half", "constant" or "pair")."""

    def __init__(self, gated: Gated, router: str) -> None:
        self.gated, self.router = gated, router

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return self.gated.needs_reference or self.router == "pair"

    @property
    def is_plain(self) -> bool:
        return self.gated.is_plain and self.router == "gradient"

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        """Two factors from router weights to router scores. Per expert: its tokens, their router weights and neurons, two factors."""
        assert isinstance(op, Experts)
        x, others = op.flat(inputs[0]), None if reference is None or not self.needs_reference else op.flat(reference.inputs[0])
        scores, chosen = op.router.scores(x), op.chosen(inputs[0])
        logits = op.router.logits(scores, chosen)
        own_weights = op.router.weights(logits, chosen)
        weights, used, pull, slope = own_weights, chosen, logits.softmax(-1), torch.ones_like(scores)
        if op.router.sigmoid:
            slope = derivative(torch.nn.functional.logsigmoid, scores)
        if self.router == "pair":
            assert reference is not None and others is not None
            scores2, chosen2 = op.router.scores(others), op.chosen(reference.inputs[0])
            logits2 = op.router.logits(scores2, chosen2)
            weights, used = (weights + op.router.weights(logits2, chosen2)) / 2, chosen | chosen2
            same = (chosen == chosen2).all(-1, keepdim=True)
            pull = logarithmic_mean(logits.masked_fill(~same, 0.0), logits2.masked_fill(~same, 0.0)) * same
            if op.router.sigmoid:
                f = torch.nn.functional.logsigmoid
                slope = rescale_factor(f, scores, f(scores), scores2, f(scores2))
        check = _Check(x)
        kept = [pull * op.router.scale, slope]
        for e in range(op.n):
            expert, tokens = op.expert(e), used[:, e].nonzero().flatten()
            neurons, *rest = self._expert(op, expert, x[tokens], None if others is None else others[tokens])
            check.add(tokens, own_weights[tokens, e], neurons, expert)
            kept += [tokens, weights[tokens, e].unsqueeze(-1), *rest]
        if op.shared is not None:
            neurons, _, *factors = self._expert(op, op.shared, x, others)
            check.add(torch.arange(len(x), device=x.device), x.new_ones(len(x)), neurons, op.shared)
            kept += factors
        check.compare(output)
        return tuple(kept)

    def _expert(self, op: Experts, expert: Expert, x: Tensor, other: Tensor | None) -> Tensors:
        """One expert's neurons, what stands for them in the product (their mean over both runs in pair form), and two factors."""
        parts = expert.parts(x)
        neurons = mean = op.gated(*parts)
        if other is None:
            return neurons, mean, *gate_factors(self.gated, op.gated, parts, None)
        others = expert.parts(other)
        if self.router == "pair":
            mean = (neurons + op.gated(*others)) / 2
        return neurons, mean, *gate_factors(self.gated, op.gated, parts, Reference(others, others[0]))

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        assert isinstance(op, Experts)
        g = working(upstream).flatten(-3, -2)
        part = 0.5 if self.router == "half" else 1.0
        to_x = torch.zeros_like(g)
        to_weights = g.new_zeros((*g.shape[:-1], op.n))
        for e in range(op.n):
            tokens, weight, neurons, *factors = kept[2 + _PER_EXPERT * e : 2 + _PER_EXPERT * (e + 1)]
            if not len(tokens):
                continue
            expert, here = op.expert(e), g[..., tokens, :]
            to_neurons = here @ expert.down.to(g.dtype)
            if self.router != "constant":  # the expert's output against g, without computing that output
                to_weights[..., tokens, e] = part * ((to_neurons * neurons).sum(-1) + _along(here, expert.down_bias))
            to_x.index_add_(-2, tokens, _through(expert, to_neurons * (weight * part), factors))
        if op.shared is not None:
            to_x = to_x + _through(op.shared, g @ op.shared.down.to(g.dtype), kept[-2:])
        if self.router != "constant":
            to_x = to_x + (pull_back(kept[0], to_weights) * kept[1]) @ op.router.weight.to(g.dtype)
        return (to_x.reshape(upstream.shape),)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        assert isinstance(op, Experts)
        gated = self.gated
        if self.router == "constant" and gated.product == "constant" and gated.activation == "identity":
            if reference is None and not op.has_biases:
                return torch.zeros_like(per_example(working(upstream)))
        if self.router == "pair" and gated.product == "pair" and gated.activation == "rescale":
            assert reference is not None
            return per_example(share(_changed_choice(op, inputs[0], reference.inputs[0]), upstream))
        return balance(inputs, output, reference, upstream, self.backward(op, self.keep(op, inputs, output, reference), upstream))


def _along(g: Tensor, bias: Tensor | None) -> Tensor | float:
    """g . bias, token by token."""
    return 0.0 if bias is None else g @ bias.to(g.dtype)


def _through(expert: Expert, to_neurons: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Coefficients at an expert's input from those at its neurons."""
    to_gate, to_up = factors
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

    def __init__(self, x: Float[Tensor, "tokens d_model"]) -> None:
        self.direction = torch.arange(1.0, x.shape[-1] + 1, dtype=x.dtype, device=x.device).cos()
        self.expected = torch.zeros_like(x[:, 0])

    def add(self, tokens: Tensor, weight: Float[Tensor, " tokens"], neurons: Float[Tensor, "tokens d_expert"], expert: Expert) -> None:
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
