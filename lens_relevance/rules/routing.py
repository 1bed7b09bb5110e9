"""Mixture of experts: y = sum over the chosen experts of router weight * expert(x), from the MLP's input to its output.

The experts are one batched module behind no HookPoint, so the whole is recomputed. Tokens are taken expert by expert, as the model does.

| part | choice | backward | source |
|---|---|---|---|
| router weight * expert | half | half of the gradient to each factor | AttnLRP (2402.05602) eq. 7 |
| router weight * expert | constant | the router weight is a constant | derived here, as CP-LRP holds gates constant |
| router weight * expert | pair | mean of the two runs' values of the other factor | derived here |
| router softmax | gradient / pair | as for attention; between two runs only where both chose the same experts | |

Where two runs choose different experts for a token the change of its router weights is not a function of small steps of its scores: that
share is the sink `router` of the account, and with it the account is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_relevance.rules.activation import Gated, GatedActivation
from lens_relevance.rules.base import Coefficients, Operation, Reference, Rule, Tensors, balance, per_example, share, working
from lens_relevance.rules.softmax import logarithmic_mean, pull_back


class Experts(Operation):
    """x -> sum of router weight * down(act(gate(x)) * up(x)) over the top k experts.

    gate_up: [expert, 2 d_expert, d_model]; down: [expert, d_model, d_expert]; router: [expert, d_model]; renormalize: router weights of the
    chosen experts sum to one (a softmax over these alone).
    """

    kind = "experts"

    def __init__(
        self,
        gate_up: Float[Tensor, "expert d_gate_up d_model"],
        down: Float[Tensor, "expert d_model d_expert"],
        router: Float[Tensor, "expert d_model"],
        top_k: int,
        renormalize: bool,
        function: Callable[[Tensor], Tensor],
    ) -> None:
        self.gate_up, self.down, self.router, self.top_k, self.renormalize = gate_up, down, router, top_k, renormalize
        self.gated = GatedActivation(function)

    def flat(self, x: Tensor) -> Float[Tensor, "tokens d_model"]:
        return working(x).flatten(0, -2)

    def scores(self, x: Float[Tensor, "tokens d_model"]) -> tuple[Float[Tensor, "tokens expert"], Bool[Tensor, "tokens expert"]]:
        """Router scores, -inf where the softmax leaves an expert out, and which experts are chosen."""
        scores = x @ self.router.to(x.dtype).T
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.top_k, -1).indices, True)
        return (scores.masked_fill(~chosen, float("-inf")) if self.renormalize else scores), chosen

    def parts(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up activations of one expert."""
        gate, up = (x @ self.gate_up[expert].to(x.dtype).T).chunk(2, -1)
        return gate, up

    def out(self, expert: int, gate: Tensor, up: Tensor) -> Tensor:
        return self.gated(gate, up) @ self.down[expert].to(gate.dtype).T

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = self.flat(inputs[0])
        scores, chosen = self.scores(x)
        weights = scores.softmax(-1) * chosen
        y = torch.stack([weights[:, e : e + 1] * self.out(e, *self.parts(e, x)) for e in range(len(self.down))]).sum(0)
        return y.reshape(inputs[0].shape)


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
        """Router: softmax weights that pull back (0 where nothing passes). Per expert: its tokens, router weight, output, two factors."""
        assert isinstance(op, Experts)
        x = op.flat(inputs[0])
        scores, chosen = op.scores(x)
        weights, used = scores.softmax(-1) * chosen, chosen
        pull = scores.softmax(-1)
        pair = self.router == "pair"
        if pair:
            assert reference is not None
            x2 = op.flat(reference.inputs[0])
            scores2, chosen2 = op.scores(x2)
            weights, used = (weights + scores2.softmax(-1) * chosen2) / 2, chosen | chosen2
            same = (chosen == chosen2).all(-1, keepdim=True)
            pull = logarithmic_mean(scores.masked_fill(~same, 0.0), scores2.masked_fill(~same, 0.0)) * same
        kept = [pull]
        for expert in range(len(op.down)):
            tokens = used[:, expert].nonzero().flatten()
            gate, up = op.parts(expert, x[tokens])
            out, other = op.out(expert, gate, up), None
            if pair:
                parts2 = op.parts(expert, x2[tokens])
                other = Reference(parts2, gate)
                out = (out + op.out(expert, *parts2)) / 2
            factors = self.gated.keep(op.gated, (gate, up), gate, other)
            kept += [tokens, weights[tokens, expert].unsqueeze(-1), out, *factors]
        return tuple(kept)

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        assert isinstance(op, Experts)
        g = working(upstream).flatten(-3, -2)
        part = 0.5 if self.router == "half" else 1.0
        to_x = torch.zeros_like(g)
        to_weights = g.new_zeros((*g.shape[:-1], len(op.down)))
        for expert in range(len(op.down)):
            tokens, weight, out, to_gate, to_up = kept[1 + 5 * expert : 6 + 5 * expert]
            here = g[..., tokens, :]
            to_weights[..., tokens, expert] = (here * out).sum(-1) * part
            hidden = (here * weight * part) @ op.down[expert].to(g.dtype)
            both = torch.cat([hidden * to_gate, hidden * to_up], -1) @ op.gate_up[expert].to(g.dtype)
            to_x.index_add_(-2, tokens, both)
        if self.router != "constant":
            to_x = to_x + pull_back(kept[0], to_weights) @ op.router.to(g.dtype)
        return (to_x.reshape(upstream.shape),)

    def sink(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor) -> Tensor:
        assert isinstance(op, Experts)
        nothing = torch.zeros_like(per_example(working(upstream)))
        if self.router == "constant" and self.gated.product == "constant" and reference is None:
            return nothing
        if not (self.router == "pair" and self.gated.product == "pair" and self.gated.activation == "rescale"):
            return balance(inputs, output, reference, upstream, self.backward(op, self.keep(op, inputs, output, reference), upstream))
        assert reference is not None
        return per_example(share(self._changed_choice(op, inputs[0], reference.inputs[0]), upstream))

    @staticmethod
    def _changed_choice(op: Experts, one: Tensor, two: Tensor) -> Tensor:
        """What the change of router weights does at tokens whose experts differ between the runs: mean(expert) * d(weight)."""
        x1, x2 = op.flat(one), op.flat(two)
        (s1, c1), (s2, c2) = op.scores(x1), op.scores(x2)
        change = (s1.softmax(-1) * c1 - s2.softmax(-1) * c2) * (c1 != c2).any(-1, keepdim=True)
        total = torch.zeros_like(x1)
        for e in range(len(op.down)):
            total = total + change[:, e : e + 1] * (op.out(e, *op.parts(e, x1)) + op.out(e, *op.parts(e, x2))) / 2
        return total.reshape(one.shape)
