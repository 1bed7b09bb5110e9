"""set_units: heads, neurons, attention and MLP outputs and residual streams held at a value while a block lasts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, Component, Node, parse_node
from analyses.interventions.features import DictionaryOfLayer, by_layer, setting_hooks
from lens_relevance.dictionaries import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.model_state import as_found
from lens_relevance.inputs.prompt import Inputs, tokenize
from lens_relevance.logit_reading import without_logits
from lens_relevance.sites import anatomy

Hook = Callable[..., Tensor | None]


@dataclass(frozen=True)
class Scale:
    """What a unit has, times a factor: 0 takes it out, 2 doubles it, -1 turns it round."""

    factor: float | int


@dataclass(frozen=True, eq=False)
class From:
    """What the unit has in a run of another prompt (text or token ids) of as many tokens, position by position."""

    prompt: Inputs


@contextmanager
def set_units(
    model: TransformerBridge, settings: Mapping[str, Any], *, prompts: Inputs | None = None, dictionaries: Sequence[Dictionary] = ()
) -> Iterator[None]:
    """Hold units at other values while the block lasts, in every forward: in `propagate` too, which then explains the changed model.

        with set_units(model, {"L9N1841": 0.0, "L11H3": "mean"}, prompts=texts):
            logits = model(prompt)

    Args:
        settings: what to do with each unit: a neuron (`L9N1841`), a head (`L11H3`, its output z), queries, keys or values of a head
            (`L11H3.q`; under grouped-query attention k and v are counted by key-value head), what attention or an MLP adds
            (`L3.attn`, `L3.mlp`), a residual stream (`L3.resid`), a feature (`L9F17`); at one position (`L11H3@14`) or at all.
            A number: every entry of the unit has this value. "mean": its mean over all tokens of `prompts`. `Scale`, `From`.
        prompts: those that means are taken over.
        dictionaries: those that features belong to. A feature that is set moves what passes its HookPoint along its decoder row; the other
            features and what the dictionary misses stay as they are. Relevance is not propagated through settings of features.

    The block is to be left by the same thread; hooks of the user's own at the same HookPoints act before.

    Raises:
        RelevanceError: no such unit on this model, a unit that is set twice, a mean without prompts, or (in the forward) inputs that a
            setting does not fit.
    """
    if not settings:
        raise RelevanceError("there is no unit to set: give {'L11H3': 0.0} or the like")
    body = anatomy(model)
    changes: defaultdict[str, list[tuple[Node, Component, Any]]] = defaultdict(list)
    features: dict[Node, Any] = {}
    for name, setting in settings.items():
        node = parse_node(name)
        _check_setting(name, setting)
        if node.feature is not None:
            features[node] = setting
            continue
        component = COMPONENTS.get(node.component)
        if component is None or component.name == "pattern":
            raise RelevanceError(f"{name} cannot be set: give a neuron, a head, q, k or v of a head, attn, mlp or resid of a layer")
        if not 0 <= node.layer < body.n_layers:
            raise RelevanceError(f"{name} is out of range: the model has {body.n_layers} layers")
        changes[body.canonical(component.write_at(node.layer))].append((node, component, setting))
    of_layer = by_layer(model, list(features), dictionaries)
    if twice := _twice(list(features)) or next(filter(None, (_twice([node for node, _, _ in here]) for here in changes.values())), None):
        raise RelevanceError(f"{twice} is set twice; a unit at all positions includes it at each")
    if prompts is None and any(setting == "mean" for setting in settings.values()):
        raise RelevanceError('"mean" is a mean over prompts: set_units(model, ..., prompts=[...])')
    values = _values(model, changes, prompts)
    hooks: list[tuple[str, Hook]] = [(point, _hook(point, here, values)) for point, here in changes.items()]
    for layer, placed in of_layer.items():
        here = {node: setting for node, setting in features.items() if node.layer == layer}
        hooks += setting_hooks(placed, here, _new_values(model, placed, here, prompts))
    with as_found(model), model.hooks(fwd_hooks=hooks):
        yield


def _check_setting(name: str, setting: Any) -> None:
    if not isinstance(setting, int | float | Scale | From) and setting != "mean":
        raise RelevanceError(f'{name}: a unit is set to a number, "mean", Scale(factor) or From(prompt), not {setting!r}')


def _twice(nodes: Sequence[Node]) -> str | None:
    """A unit that two settings at one HookPoint are for."""
    for i, node in enumerate(nodes):
        for other in nodes[:i]:
            same = replace(node, position=None) == replace(other, position=None)
            if same and (node.position == other.position or None in (node.position, other.position)):
                return str(node)
    return None


def _part(node: Node, component: Component, tensor: Tensor) -> tuple[Any, ...]:
    """Where a unit is in a tensor of its component [batch, pos, (head,) width]."""
    index = node.head if "head" in component.axes else node.neuron
    if index is not None and index >= tensor.shape[2]:
        raise RelevanceError(
            f"{node} is out of range: the layer has {tensor.shape[2]} {'heads here' if node.head is not None else 'neurons'}"
        )
    if node.position is not None and node.position >= tensor.shape[1]:
        raise RelevanceError(f"{node} is out of range: this forward has {tensor.shape[1]} positions")
    at = slice(None) if node.position is None else slice(node.position, node.position + 1)
    return (slice(None), at) if index is None else (slice(None), at, index)


def _values(
    model: TransformerBridge, changes: Mapping[str, list[tuple[Node, Component, Any]]], prompts: Inputs | None
) -> dict[tuple[str, int], Tensor]:
    """Means, and activations of other prompts, by HookPoint and the number of the setting there."""
    runs: dict[int, Any] = {}

    def run(inputs: Inputs) -> tuple[Any, Tensor]:
        if id(inputs) not in runs:
            tokens, mask = tokenize(model, inputs)
            with torch.no_grad(), without_logits(model, tokens):
                _, cache = model.run_with_cache(tokens, names_filter=list(changes), attention_mask=mask)
            runs[id(inputs)] = cache, mask
        return runs[id(inputs)]

    values = {}
    for point, here in changes.items():
        for i, (node, component, setting) in enumerate(here):
            if isinstance(setting, From):
                activation = run(setting.prompt)[0][point]
                values[point, i] = activation[_part(node, component, activation)]
            elif setting == "mean":
                assert prompts is not None
                cache, mask = run(prompts)
                whole = cache[point]
                everywhere = Node(node.component, node.layer, None, node.head, node.neuron)
                values[point, i] = whole[_part(everywhere, component, whole)][mask.bool()].mean(0)
    return values


def _new_values(
    model: TransformerBridge, placed: DictionaryOfLayer, settings: Mapping[Node, Any], prompts: Inputs | None
) -> Callable[[Node, Tensor, Any], Tensor]:
    """What features are set to, from what they have [batch, pos]."""

    def values_on(inputs: Inputs) -> tuple[Tensor, Tensor]:
        tokens, mask = tokenize(model, inputs)
        with torch.no_grad(), without_logits(model, tokens):
            _, cache = model.run_with_cache(tokens, names_filter=placed.point_in, attention_mask=mask)
            return placed.values(cache[placed.point_in]), mask.bool()

    means = None
    if prompts is not None and "mean" in [setting for setting in settings.values() if isinstance(setting, str)]:
        values, real = values_on(prompts)
        means = values[real].mean(0)
    others = {node: values_on(setting.prompt)[0] for node, setting in settings.items() if isinstance(setting, From)}

    def new_value(node: Node, values: Tensor, setting: Any) -> Tensor:
        if isinstance(setting, Scale):
            return values * setting.factor
        if not isinstance(setting, From):
            assert node.feature is not None
            return torch.full_like(values, float(means[node.feature] if means is not None and setting == "mean" else setting))
        other = others[node][..., node.feature]
        other = other if node.position is None else other[:, node.position : node.position + 1]
        if other.shape[1] != values.shape[1]:
            raise RelevanceError(
                f"{node}: the prompt that its value is from has {other.shape[1]} positions, this forward {values.shape[1]}"
            )
        return other.expand_as(values)

    return new_value


def _hook(point: str, here: list[tuple[Node, Component, Any]], values: Mapping[tuple[str, int], Tensor]) -> Hook:
    def change(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        for i, (node, component, setting) in enumerate(here):
            part = _part(node, component, x)
            if isinstance(setting, Scale):
                x[part] = x[part] * setting.factor
            elif (point, i) not in values:
                x[part] = float(setting)
            else:
                value = values[point, i]
                if isinstance(setting, From) and value.shape[1] != x[part].shape[1]:
                    raise RelevanceError(
                        f"{node}: the prompt that its value is from has {value.shape[1]} positions, this forward {x[part].shape[1]}"
                    )
                x[part] = value.to(x)
        return x

    return change
