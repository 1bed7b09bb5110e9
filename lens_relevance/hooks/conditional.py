"""Conditional relevance: only what flows through chosen units, as concept-based LRP does (CRP, Achtibat et al. 2023; our reading).

`through` maps HookPoints to the units kept there, by axis: {"blocks.1.attn.hook_z": {"head": [0, 3]}},
{"blocks.2.mlp.hook_post": {"unit": [17]}}, {"blocks.1.hook_resid_pre": {"position": [4]}}; heads and neurons also go by name, "L1H3" or
["L1H0", "L1H3"]. The flow from the target has to pass every
HookPoint named, from the top of the model downward, and only through those units; everything else, the paths around a HookPoint among it,
is left out. So the sum over a partition of a HookPoint's units is what passes that HookPoint, and for a whole cut (a resid_pre) it is the
unrestricted relevance. Features of a dictionary go by the HookPoint that it writes to: {"blocks.2.mlp.hook_out": {"feature": [17]}}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.placed_dictionary import PlacedDictionary, dictionary_at
from lens_relevance.sites import Anatomy


@dataclass(frozen=True)
class Condition:
    """The units of one HookPoint that the flow has to pass."""

    name: str
    point: HookPoint
    units: Mapping[str, Any]
    conversion: Any = None  # to TransformerLens's layout and back

    def restrict(self, coefficient: Tensor) -> Tensor:
        """The raw coefficient with everything but these units set to zero."""
        conversion = self.conversion
        laid_out = coefficient if conversion is None else conversion.convert(coefficient)
        axes = {"position": 1, "unit": -1}
        if laid_out.ndim == 4:  # q_norm and the like have their heads before the positions, and so have patterns (of queries, then keys)
            heads_first = conversion is None and (self.point.pos_dim == 2 or self.name.endswith(("hook_pattern", "hook_attn_scores")))
            axes |= {"head": 1, "position": 2} if heads_first else {"head": 2}
        mask = torch.ones(laid_out.shape[1:], dtype=torch.bool, device=laid_out.device)
        for axis, indices in self.units.items():
            if axis not in axes:
                raise RelevanceError(f"through: {self.name} has the axes {', '.join(axes)}, not {axis!r}")
            dim = axes[axis] % laid_out.ndim
            chosen = torch.zeros(laid_out.shape[dim], dtype=torch.bool, device=laid_out.device)
            listed = torch.as_tensor(indices, device=laid_out.device).reshape(-1)
            size = laid_out.shape[dim]
            if listed.dtype == torch.bool:
                listed = listed.nonzero().flatten()
            if bool(((listed < -size) | (listed >= size)).any()):
                raise RelevanceError(f"through: {axis} {listed.tolist()} is out of range at {self.name}, which has {size}")
            chosen[listed] = True
            shape = [1] * mask.ndim
            shape[dim - 1] = size
            mask = mask & chosen.reshape(shape)
        restricted = laid_out * mask
        return restricted if conversion is None else conversion.revert(restricted).reshape(coefficient.shape)


@dataclass(frozen=True)
class FeatureCondition:
    """The features of a dictionary that the flow has to pass, at these positions of `n_positions` in each row, or at all (None)."""

    placed: PlacedDictionary
    chosen: tuple[int, ...]
    positions: tuple[int, ...] | None
    n_positions: int

    @property
    def name(self) -> str:
        """What the features are called among a run's tensors."""
        return self.placed.name

    def restrict(self, coefficient: Tensor) -> Tensor:
        """The coefficients of the features that are on, zero but at these."""
        features = self.placed.features
        assert features is not None
        kept = torch.isin(features.feature, torch.tensor(self.chosen, device=coefficient.device))
        if self.positions is not None:
            kept &= torch.isin(features.token % self.n_positions, torch.tensor(self.positions, device=coefficient.device))
        return coefficient * kept


AnyCondition = Condition | FeatureCondition
Through = Mapping[str, Any] | str | Sequence[str] | None
_HEAD, _NEURON = re.compile(r"L(\d+)H(\d+)"), re.compile(r"L(\d+)N(\d+)")


def _by_point(through: Through) -> Mapping[str, Any]:
    """Names of heads and neurons ("L1H3", "L9N1841") as units by HookPoint; those of one layer and kind belong together."""
    if through is None:
        return {}
    if isinstance(through, Mapping):
        return through
    units: dict[str, dict[str, list[int]]] = {}
    for text in [through] if isinstance(through, str) else list(through):
        if isinstance(text, str) and (head := _HEAD.fullmatch(text.strip())):
            units.setdefault(f"blocks.{head[1]}.attn.hook_z", {"head": []})["head"].append(int(head[2]))
        elif isinstance(text, str) and (neuron := _NEURON.fullmatch(text.strip())):
            units.setdefault(f"blocks.{neuron[1]}.mlp.hook_post", {"unit": []})["unit"].append(int(neuron[2]))
        else:
            raise RelevanceError(
                f"through: {text!r} is neither a head (L1H3) nor a neuron (L9N1841); other units go by HookPoint and axis, as in "
                "{'blocks.1.hook_resid_pre': {'position': [4]}}"
            )
    return units


def read_conditions(
    anatomy: Anatomy, through: Through, dictionaries: Sequence[PlacedDictionary] = (), *, n_positions: int = 0
) -> list[AnyCondition]:
    """Conditions from what the user gave; n_positions: of each row."""
    conditions: list[AnyCondition] = []
    for name, units in _by_point(through).items():
        if not isinstance(units, Mapping) or not units:
            raise RelevanceError(f"through[{name!r}] must name units by axis, as in {{'head': [0, 3]}}, got {units!r}")
        canonical = anatomy.canonical(name)
        if "feature" in units:
            conditions.append(_feature_condition(dictionary_at(dictionaries, canonical), units, n_positions))
            continue
        conditions.append(Condition(canonical, anatomy.points[canonical], units, anatomy.conversion(canonical)))
    return conditions


def _feature_condition(placed: PlacedDictionary, units: Mapping[str, Any], n_positions: int) -> FeatureCondition:
    """The condition of {"feature": [17], "position": [4]}."""
    if set(units) - {"feature", "position"}:
        raise RelevanceError(f"through: features of {placed.points_out[0]} have the axes feature and position, not {', '.join(units)}")
    if not placed.encodes:
        raise RelevanceError("through: relevance flows through features under dictionary_path='features' alone")
    sizes = {"feature": placed.dictionary.n_features, "position": n_positions}
    chosen: dict[str, tuple[int, ...]] = {}
    for axis, indices in units.items():
        listed = torch.as_tensor(indices).reshape(-1).tolist()
        if any(not -sizes[axis] <= i < sizes[axis] for i in listed):
            raise RelevanceError(f"through: {axis} {listed} is out of range at {placed.points_out[0]}, which has {sizes[axis]}")
        chosen[axis] = tuple(i % sizes[axis] for i in listed)
    return FeatureCondition(placed, chosen["feature"], chosen.get("position"), n_positions)


def backward_through(root: Tensor, seed: Tensor, tensors: dict[str, Tensor], *, conditions: Sequence[AnyCondition]) -> dict[str, Tensor]:
    """Coefficients at the tapped tensors, from `seed` at `root` by way of every condition, the one that fired last first.

    One backward pass; a condition adds one from its HookPoint downward.
    """
    order = list(tensors)
    upward = sorted(conditions, key=lambda c: order.index(c.name) if c.name in tensors else -1)
    tops, seeds = [root], [seed]
    while upward:
        condition = upward.pop()
        here = tensors.get(condition.name)
        if here is None or not here.requires_grad:
            raise RelevanceError(f"through: {condition.name} did not fire, or is not live, in this forward")
        (arrived,) = torch.autograd.grad(tops, [here], seeds, allow_unused=True, retain_graph=True)
        if arrived is None:
            raise RelevanceError(f"through: nothing flows from the target to {condition.name}")
        tops, seeds = [here], [condition.restrict(arrived)]
    last = next((name for name, tensor in tensors.items() if tensor is tops[0]), None) if conditions else None
    listed = [name for name, tensor in tensors.items() if tensor.requires_grad and name != last]
    gradients = torch.autograd.grad(tops, [tensors[name] for name in listed], seeds, allow_unused=True) if listed else ()
    coefficients = {name: g for name, g in zip(listed, gradients, strict=True) if g is not None}
    if last:
        coefficients[last] = seeds[0]
    return coefficients
