"""Features of dictionaries held at other values: what passes the HookPoint is moved along their decoder rows, the error stays as it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import Node
from lens_relevance.dictionaries import Dictionary
from lens_relevance.errors import RelevanceError
from lens_relevance.hooks.placed_dictionary import as_rows
from lens_relevance.hooks.ruled_point import RuledHookPoint
from lens_relevance.sites import anatomy
from lens_relevance.sites.base import block_of


class DictionaryOfLayer:
    """A dictionary in a model, for settings of its features."""

    def __init__(self, model: TransformerBridge, dictionary: Dictionary) -> None:
        names = anatomy(model)
        self.dictionary = dictionary
        self._points = list(names.points.values())
        self.point_in = names.canonical(dictionary.point_in)
        self.points_out = [names.canonical(name) for name in dictionary.point_out]
        self.layer = block_of(self.points_out[0])[1]

    def values(self, x: Tensor) -> Float[Tensor, "batch pos feature"]:
        """What each feature writes, times its decoder row, for an activation at point_in."""
        rows = as_rows(x, self.dictionary.d_in, f"{self.dictionary!r} reads", self.point_in)
        return self.dictionary.to(rows).written(rows).unflatten(0, x.shape[:2])

    def hooks(self, features: Sequence[int], new_values: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Callable[..., Tensor | None]]]:
        """Hooks that hold features at `new_values(values [batch, pos, n])`, in the order in which their HookPoints fire."""
        changes: list[Tensor] = []

        def read(x: Tensor, hook: object) -> None:
            if any(isinstance(point, RuledHookPoint) for point in self._points):
                raise RelevanceError(
                    "relevance cannot be propagated while features are set: no rule says how it passes what is in their place. Explain "
                    "the model without the settings"
                )
            values = self.values(x)[..., features]
            changes[:] = [new_values(values) - values]

        def write(decoder: Tensor) -> Callable[..., Tensor]:
            def hook_fn(y: Tensor, hook: object) -> Tensor:
                return y + (changes[0] @ decoder[features].to(changes[0])).reshape(y.shape).to(y)

            return hook_fn

        yield self.point_in, read
        for point, decoder in zip(self.points_out, self.dictionary.decoder, strict=True):
            yield point, write(decoder)


def by_layer(model: TransformerBridge, nodes: Sequence[Node], dictionaries: Sequence[Dictionary]) -> dict[int, DictionaryOfLayer]:
    """The dictionaries whose features are named, by the layer that these names say.

    Raises:
        RelevanceError: None of that layer, several, or a feature out of range.
    """
    there: defaultdict[int | None, list[DictionaryOfLayer]] = defaultdict(list)
    for dictionary in dictionaries:
        placed = DictionaryOfLayer(model, dictionary)
        there[placed.layer].append(placed)
    for node in nodes:
        here = there.get(node.layer, [])
        if len(here) != 1:
            raise RelevanceError(f"{node}: {len(here)} of the dictionaries write in layer {node.layer}; pass one, as in dictionaries=[...]")
        if node.feature is None or node.feature >= here[0].dictionary.n_features:
            raise RelevanceError(f"{node} is out of range: {here[0].dictionary!r}")
    return {layer: here[0] for layer, here in there.items() if layer is not None and any(node.layer == layer for node in nodes)}


def setting_hooks(
    placed: DictionaryOfLayer, settings: Mapping[Node, Any], new_value: Callable[[Node, Tensor, Any], Tensor]
) -> list[tuple[str, Callable[..., Tensor | None]]]:
    """Hooks for all settings of features of one dictionary.

    Args:
        new_value: From a node, what its feature has [batch, pos] and its setting to what it is set to.
    """
    features = sorted({node.feature for node in settings if node.feature is not None})

    def new_values(values: Tensor) -> Tensor:
        new = values.clone()
        for node, setting in settings.items():
            column = features.index(node.feature if node.feature is not None else -1)
            if node.position is not None and node.position >= values.shape[1]:
                raise RelevanceError(f"{node} is out of range: this forward has {values.shape[1]} positions")
            at = slice(None) if node.position is None else slice(node.position, node.position + 1)
            new[:, at, column] = new_value(node, values[:, at, column], setting)
        return new

    return list(placed.hooks(features, new_values))
