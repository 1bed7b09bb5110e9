"""Mixtures of experts as operations: a router, its experts, and what every token passes besides them (shared experts)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_relevance.rules.activation import GatedActivation
from lens_relevance.rules.base import Operation, working


@dataclass(frozen=True)
class Expert:
    """One expert's weights: y = down(gated(gate(x), up(x))), as a gated MLP of its own."""

    gate: Float[Tensor, "d_expert d_model"]
    up: Float[Tensor, "d_expert d_model"]
    down: Float[Tensor, "d_model d_expert"]
    gate_bias: Float[Tensor, " d_expert"] | None = None
    up_bias: Float[Tensor, " d_expert"] | None = None
    down_bias: Float[Tensor, " d_model"] | None = None

    def parts(self, x: Float[Tensor, "tokens d_model"]) -> tuple[Float[Tensor, "tokens d_expert"], Float[Tensor, "tokens d_expert"]]:
        """Gate and up activations."""
        return _linear(x, self.gate, self.gate_bias), _linear(x, self.up, self.up_bias)

    def out(self, neurons: Float[Tensor, "tokens d_expert"]) -> Float[Tensor, "tokens d_model"]:
        return _linear(neurons, self.down, self.down_bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


@dataclass(frozen=True)
class Router:
    """Which experts a token goes to, and with what weights.

    weight, bias: of the router's scores. choose(x): the experts that the model itself chooses, [tokens, k] of their indices.
    The weights are `scale` times softmax(scores), over the chosen experts alone or, with over_all, over all of them; with sigmoid,
    sigmoid(score) / sum of the chosen experts' sigmoid(score), which is the softmax of log sigmoid(score).
    """

    weight: Float[Tensor, "expert d_model"]
    choose: Callable[[Tensor], Int[Tensor, "tokens k"]]
    bias: Float[Tensor, " expert"] | None = None
    over_all: bool = False
    sigmoid: bool = False
    scale: float = 1.0

    def scores(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens expert"]:
        return _linear(x, self.weight, self.bias)

    def chosen(self, x: Float[Tensor, "tokens d_model"]) -> Bool[Tensor, "tokens expert"]:
        none = torch.zeros(len(x), len(self.weight), dtype=torch.bool, device=x.device)
        return none.scatter(1, self.choose(x).long(), True)

    def logits(self, scores: Float[Tensor, "tokens expert"], chosen: Bool[Tensor, "tokens expert"]) -> Float[Tensor, "tokens expert"]:
        """What the softmax is taken of; -inf where it leaves an expert out."""
        logits = torch.nn.functional.logsigmoid(scores) if self.sigmoid else scores
        return logits if self.over_all else logits.masked_fill(~chosen, float("-inf"))

    def weights(self, logits: Float[Tensor, "tokens expert"], chosen: Bool[Tensor, "tokens expert"]) -> Float[Tensor, "tokens expert"]:
        return self.scale * logits.softmax(-1) * chosen


class Experts(Operation):
    """x -> sum over the chosen experts of router weight * expert(x), plus shared(x).

    expert(e): the weights of the e-th of n experts (taken when needed: views of a batched tensor). gated: the activation of them all.
    """

    kind = "experts"

    def __init__(
        self, router: Router, expert: Callable[[int], Expert], n: int, gated: GatedActivation, shared: Expert | None = None
    ) -> None:
        self.router, self.expert, self.n, self.gated, self.shared = router, expert, n, gated, shared

    @property
    def has_biases(self) -> bool:
        one = self.expert(0)
        return any(bias is not None for bias in (self.router.bias, one.gate_bias, one.up_bias, one.down_bias))

    def flat(self, x: Tensor) -> Float[Tensor, "tokens d_model"]:
        return working(x).flatten(0, -2)

    def chosen(self, x: Tensor) -> Bool[Tensor, "tokens expert"]:
        """By the model's own router, on the tensor as the model has it: rounding must not decide differently here."""
        return self.router.chosen(x.flatten(0, -2))

    def outs(self, x: Float[Tensor, "tokens d_model"], expert: Expert) -> Float[Tensor, "tokens d_model"]:
        return expert.out(self.gated(*expert.parts(x)))

    def __call__(self, *inputs: Tensor) -> Tensor:
        x, chosen = self.flat(inputs[0]), self.chosen(inputs[0])
        weights = self.router.weights(self.router.logits(self.router.scores(x), chosen), chosen)
        y = torch.stack([weights[:, e : e + 1] * self.outs(x, self.expert(e)) for e in range(self.n)]).sum(0)
        if self.shared is not None:
            y = y + self.outs(x, self.shared)
        return y.reshape(inputs[0].shape)
