"""The features that are on, token by token, with what the backward needs of each: nothing is kept of those that are off in both runs.

A feature that is off has the value 0, and its activation passes nothing under any rule: its slope is 0, and between two runs its change is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_relevance.dictionaries.dictionary import Dictionary, Scales
from lens_relevance.rules.activation import ElementwiseRule, Function, derivative
from lens_relevance.rules.base import Rule

_AT_ONCE = 2**14  # rows of a weight that are gathered at a time


@dataclass(frozen=True, eq=False)
class ActiveFeatures:
    """n features, each at a token, in the order of the tokens.

    Attributes:
        token, feature: Which ones.
        value: What each writes, times its decoder row: the feature's value, times the token's norm where the dictionary normalises.
        other: The same in the reference run; zeros where there is none.
        change: Of what each reads between the two runs; what it reads, where there is no reference run.
        bias: The share of `change` that comes of biases, as a token's norm scales them.
        slope: What a coefficient at the value is multiplied with to be one at what the feature reads.
        n_tokens: Tokens that there are.
    """

    token: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    value: Float[Tensor, " n"]
    other: Float[Tensor, " n"]
    change: Float[Tensor, " n"]
    bias: Float[Tensor, " n"]
    slope: Float[Tensor, " n"]
    n_tokens: int

    def __len__(self) -> int:
        return len(self.token)

    def by_token(self, amounts: Float[Tensor, " n"]) -> Float[Tensor, " token"]:
        """Sums over the features of each token."""
        return amounts.new_zeros(self.n_tokens).index_add(0, self.token, amounts)

    def written(self, weight: Float[Tensor, "feature d"], amounts: Float[Tensor, " n"]) -> Float[Tensor, "token d"]:
        """For each token the sum of its features' rows of a weight, each times an amount."""
        if not len(self):
            return weight.new_zeros(self.n_tokens, weight.shape[1])
        starts = torch.searchsorted(self.token, torch.arange(self.n_tokens, device=self.token.device))
        return torch.nn.functional.embedding_bag(self.feature, weight, starts, mode="sum", per_sample_weights=amounts)

    def along(self, weight: Float[Tensor, "feature d"], rows: Float[Tensor, "token d"]) -> Float[Tensor, " n"]:
        """The product of each feature's row of a weight with its token's row."""
        parts = zip(self.token.split(_AT_ONCE), self.feature.split(_AT_ONCE), strict=True)
        return torch.cat([torch.linalg.vecdot(weight[feature], rows[token]) for token, feature in parts])


def active_features(
    dictionary: Dictionary, x: Float[Tensor, "token d_in"], other: Tensor | None, *, rule: Rule, only: int | None = None
) -> ActiveFeatures:
    """The features that are on at x, or in the reference run; only: this one at every token, on or not."""
    before, values, scales = _read(dictionary, x)
    on = values != 0
    elsewhere = None if other is None else _read(dictionary, other)
    if elsewhere is not None:
        on |= elsewhere[1] != 0
    if only is not None:
        on = torch.zeros_like(on)
        on[:, only] = True
    token, feature = on.nonzero(as_tuple=True)
    y, function = values[token, feature], dictionary.activation.at(before, token, feature)
    read, bias = before[token, feature], _bias_read(dictionary)[feature]
    if scales is not None:
        into, out = scales.into[token, 0], scales.out[token, 0]
        read, bias, y, function = read * into, bias * into, y * out, _Scaled(function, into, out)
    if elsewhere is None:
        return ActiveFeatures(
            token, feature, y, torch.zeros_like(y), read, bias, _slope(rule, function, read, y=y, reference=None), n_tokens=len(x)
        )
    before, values, scales = elsewhere
    other_y, other_read, other_bias = values[token, feature], before[token, feature], _bias_read(dictionary)[feature]
    if scales is not None:
        into, out = scales.into[token, 0], scales.out[token, 0]
        other_read, other_bias, other_y = other_read * into, other_bias * into, other_y * out
    slope = _slope(rule, function, read, y=y, reference=(other_read, other_y))
    return ActiveFeatures(token, feature, y, other_y, read - other_read, bias - other_bias, slope, n_tokens=len(x))


def _read(dictionary: Dictionary, x: Tensor) -> tuple[Tensor, Tensor, Scales | None]:
    """Pre-activations, values, and what the tokens are normalised with."""
    before = dictionary.before_activation(x)
    return before, dictionary.activation(before), dictionary.scales(x)


def _bias_read(dictionary: Dictionary) -> Float[Tensor, " feature"]:
    """What each feature reads of a zero activation."""
    if dictionary.input_bias is None:
        return dictionary.encoder_bias
    return dictionary.encoder_bias - dictionary.encoder @ dictionary.input_bias


def _slope(rule: Rule, function: Function, x: Tensor, *, y: Tensor, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    return rule.slope_at(function, x, y, reference) if isinstance(rule, ElementwiseRule) else derivative(function, x)


class _Scaled:
    """out * f(x / into), entry by entry."""

    def __init__(self, function: Function, into: Tensor, out: Tensor) -> None:
        self.function, self.into, self.out = function, into, out

    def __call__(self, x: Tensor) -> Tensor:
        return self.out * self.function(x / self.into)

    def of_part(self, chosen: Tensor) -> Function:
        """The function of some of the entries."""
        part = getattr(self.function, "of_part", None)
        return _Scaled(self.function if part is None else part(chosen), self.into[chosen], self.out[chosen])
