"""The weights of a mixture of experts: one expert, and the router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Expert:
    """One expert's weights: y = down(gated(gate(x), up(x))), as a gated MLP of its own."""

    gate: Float[Tensor, "d_expert d_model"]
    up: Float[Tensor, "d_expert d_model"]
    down: Float[Tensor, "d_model d_expert"]
    gate_bias: Float[Tensor, " d_expert"] | None = None
    up_bias: Float[Tensor, " d_expert"] | None = None
    down_bias: Float[Tensor, " d_model"] | None = None

    def parts(self, x: Float[Tensor, "token d_model"]) -> tuple[Float[Tensor, "token d_expert"], Float[Tensor, "token d_expert"]]:
        """Gate and up activations."""
        return _linear(x, self.gate, self.gate_bias), _linear(x, self.up, self.up_bias)

    def out(self, neurons: Float[Tensor, "token d_expert"]) -> Float[Tensor, "token d_model"]:
        """What the expert writes, from its neurons."""
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
    choose: Callable[[Float[Tensor, "token d_model"]], Int[Tensor, "token k"]]
    bias: Float[Tensor, " expert"] | None = None
    over_all: bool = False
    sigmoid: bool = False
    scale: float = 1.0

    def scores(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token expert"]:
        """Logits of the experts."""
        return _linear(x, self.weight, self.bias)

    def chosen(self, x: Float[Tensor, "token d_model"]) -> Bool[Tensor, "token expert"]:
        """Which experts each token goes to."""
        none = torch.zeros(len(x), len(self.weight), dtype=torch.bool, device=x.device)
        return none.scatter(1, self.choose(x).long(), True)

    def logits(self, scores: Float[Tensor, "token expert"], chosen: Bool[Tensor, "token expert"]) -> Float[Tensor, "token expert"]:
        """What the softmax is taken of; -inf where it leaves an expert out."""
        logits = torch.nn.functional.logsigmoid(scores) if self.sigmoid else scores
        return logits if self.over_all else logits.masked_fill(~chosen, float("-inf"))

    def weights(self, logits: Float[Tensor, "token expert"], chosen: Bool[Tensor, "token expert"]) -> Float[Tensor, "token expert"]:
        """The weights of the chosen experts, 0 for the others."""
        return self.scale * logits.softmax(-1) * chosen
