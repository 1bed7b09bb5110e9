"""Which nodes a call of patching means: components by name, single nodes, or both."""

from __future__ import annotations

from collections.abc import Sequence

from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, Component, Node, find_node, resolve_component
from analyses.models.structure import n_layers
from lens_relevance.errors import OutOfRangeError, RelevanceError

Selection = str | Component | Node | Sequence[str | Component | Node]
"""A component for all its layers and heads (`"heads"`), a single node (`Node("heads", 3, head=5)` or `"L3H5"`), or several of these."""

Shapes = dict[tuple[str, int], tuple[int, ...]]
"""Shape of the activation of each (component, layer)."""


def as_list(selection: Selection) -> list[Component | Node]:
    """What was asked for, one by one.

    Raises:
        RelevanceError: a name that is neither a component's nor a node's.
    """
    items = [selection] if isinstance(selection, str | Component | Node) else list(selection)
    return [find_node(item) or resolve_component(item) if isinstance(item, str) else item for item in items]


def layers_of(model: TransformerBridge, selection: Selection) -> list[tuple[str, int]]:
    """Every (component, layer) that a selection means, in order and once.

    Raises:
        RelevanceError: a component that does not exist or that this model lacks, or nothing at all.
        OutOfRangeError: a layer that the model lacks.
    """
    count = n_layers(model)
    wanted: dict[tuple[str, int], None] = {}
    for item in as_list(selection):
        if isinstance(item, Component):
            if item.name == "neurons":
                raise RelevanceError("single neurons are patched as a chosen set: pass 'L0N5' or Node('neurons', 0, neuron=5) for each")
            wanted |= {(item.name, layer): None for layer in range(count)}
            continue
        if item.component not in COMPONENTS:
            raise RelevanceError(f"{item} cannot be patched; nodes of {', '.join(COMPONENTS)} can")
        if not 0 <= item.layer < count:
            raise OutOfRangeError(f"{item}: there is no layer {item.layer}, the model has {count} layers (0 to {count - 1})")
        wanted[item.component, item.layer] = None
    if not wanted:
        raise RelevanceError(f"nothing to patch: name components among {', '.join(COMPONENTS)}")
    for name, layer in wanted:
        for point in (COMPONENTS[name].read_at(layer), COMPONENTS[name].write_at(layer)):
            if point not in model.hook_dict:
                block = type(model.blocks[layer]).__name__
                raise RelevanceError(
                    f"this model has no {name!r} in block {layer} ({block} has no {point.removeprefix(f'blocks.{layer}.')})"
                )
    return list(wanted)


def nodes_of(selection: Selection, shapes: Shapes, by_position: bool | None) -> list[Node]:
    """The nodes that a selection means: a component stands for all layers and heads, a node for itself.

    Args:
        by_position: one node per position, or one for all positions; None takes the component's usual. Nodes are left as they are.

    Raises:
        RelevanceError: a node that lacks a head or neuron or has one too many.
        OutOfRangeError: a position, head or neuron that there is not.
    """
    nodes: list[Node] = []
    for item in as_list(selection):
        if isinstance(item, Node):
            _check(item, shapes[item.component, item.layer])
            nodes.append(item)
            continue
        for (name, layer), shape in shapes.items():
            if name != item.name:
                continue
            size = dict(zip(item.axes, shape, strict=True))
            split = item.by_position if by_position is None else by_position
            for position in range(size["pos"]) if split else [None]:
                for head in range(size["head"]) if "head" in size else [None]:
                    nodes.append(Node(name, layer, position, head))
    return nodes


def _check(node: Node, shape: tuple[int, ...]) -> None:
    """Refuse a node whose position, head or neuron does not fit the activation."""
    size = dict(zip(COMPONENTS[node.component].axes, shape, strict=True))
    for axis, index in (("head", node.head), ("neuron", node.neuron)):
        if axis in size and index is None:
            raise RelevanceError(f"{node}: name the {axis}, as in Node({node.component!r}, {node.layer}, {axis}=0)")
        if axis not in size and index is not None:
            raise RelevanceError(f"{node}: {node.component!r} has no {axis}s")
    for axis, index in (("pos", node.position), ("head", node.head), ("neuron", node.neuron)):
        if index is not None and not 0 <= index < size[axis]:
            word = {"pos": "position"}.get(axis, axis)
            raise OutOfRangeError(f"{node}: there is no {word} {index}, {node.component!r} of block {node.layer} has {size[axis]} of them")
