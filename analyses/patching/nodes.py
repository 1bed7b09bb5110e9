"""What can be patched: the components of a model, and single nodes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Component:
    """Where a kind of activation lives.

    Attributes:
        read: HookPoint within a block that holds its value.
        axes: what each axis of that value is.
        write: HookPoint where it is set.
        by_position: whether it is patched position by position unless told otherwise, as is usual in the field.
    """

    read: str
    axes: tuple[str, ...]
    write: str
    by_position: bool = False


_STREAM = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")

COMPONENTS: dict[str, Component] = {
    "resid_pre": Component("hook_resid_pre", _STREAM, "hook_resid_pre", True),
    # hook_resid_mid sits on the branch into the MLP: setting it leaves the residual connection as it was. What attention adds to the
    # stream reaches both, so the stream is set there.
    "resid_mid": Component("hook_resid_mid", _STREAM, "hook_attn_out", True),
    "resid_post": Component("hook_resid_post", _STREAM, "hook_resid_post", True),
    "attn_out": Component("hook_attn_out", _STREAM, "hook_attn_out", True),
    "mlp_out": Component("hook_mlp_out", _STREAM, "hook_mlp_out", True),
    "z": Component("attn.hook_z", _HEADS, "attn.hook_z"),
    "q": Component("attn.hook_q", _HEADS, "attn.hook_q"),
    "k": Component("attn.hook_k", _HEADS, "attn.hook_k"),
    "v": Component("attn.hook_v", _HEADS, "attn.hook_v"),
    "pattern": Component("attn.hook_pattern", ("batch", "head", "pos", "key"), "attn.hook_pattern"),
    "neuron": Component("mlp.hook_post", ("batch", "pos", "neuron"), "mlp.hook_post"),
}
"""Every component by name. z, q, k, v and pattern are per head; under grouped-query attention k and v count key-value heads."""


@dataclass(frozen=True, order=True)
class Node:
    """One thing to patch: a component in one layer, at one position or (None) at all of them.

    `head` is needed for z, q, k, v and pattern, `neuron` for neuron. The position of a pattern is its query (destination) position.
    """

    component: str
    layer: int
    position: int | None = None
    head: int | None = None
    neuron: int | None = None

    def __str__(self) -> str:
        part = self.head if self.head is not None else self.neuron
        where = f" at {self.position}" if self.position is not None else ""
        return f"{self.component} {self.layer}{'' if part is None else f'.{part}'}{where}"


Shapes = dict[tuple[str, int], tuple[int, ...]]
"""Shape of the activation of each (component, layer)."""


def as_list(components: str | Node | Sequence[str | Node]) -> list[str | Node]:
    """One component, one node or a sequence of them as a list."""
    return [components] if isinstance(components, str | Node) else list(components)


def touched(model: TransformerBridge, components: str | Node | Sequence[str | Node]) -> list[tuple[str, int]]:
    """Every (component, layer) that `components` speaks of, in order and once.

    Raises ValueError for a component that does not exist or that this model lacks, IndexError for a layer that it lacks.
    """
    if not hasattr(model, "blocks"):
        raise ValueError("patching needs a model with one stack of blocks (model.blocks); encoder-decoder models have two")
    n_layers = len(model.blocks)
    wanted: dict[tuple[str, int], None] = {}
    for item in as_list(components):
        name = item if isinstance(item, str) else item.component
        if name not in COMPONENTS:
            raise ValueError(f"unknown component {name!r}; there are {', '.join(COMPONENTS)}")
        if name == "neuron" and isinstance(item, str):
            raise ValueError("single neurons are patched as a chosen set: pass Node('neuron', layer, neuron=index), one per neuron")
        if isinstance(item, Node) and not 0 <= item.layer < n_layers:
            raise IndexError(f"{item}: there is no layer {item.layer}, the model has {n_layers} layers (0 to {n_layers - 1})")
        for layer in range(n_layers) if isinstance(item, str) else [item.layer]:
            wanted[name, layer] = None
    if not wanted:
        raise ValueError(f"nothing to patch: name components among {', '.join(COMPONENTS)}")
    hooks = model.hook_dict
    for name, layer in wanted:
        for hook in {COMPONENTS[name].read, COMPONENTS[name].write}:
            if f"blocks.{layer}.{hook}" not in hooks:
                raise ValueError(f"this model has no {name!r} in block {layer} ({type(model.blocks[layer]).__name__} has no {hook})")
    return list(wanted)


def expand(components: str | Node | Sequence[str | Node], shapes: Shapes, by_position: bool | None) -> list[Node]:
    """The nodes that `components` speaks of: a name stands for all layers and heads, a Node for itself.

    Args:
        by_position: one node per position, or one for all positions; None takes the component's usual. Nodes are left as they are.

    Raises ValueError for a node that lacks a head or neuron or has one too many, IndexError for one out of range.
    """
    nodes: list[Node] = []
    for item in as_list(components):
        if isinstance(item, Node):
            _check(item, shapes[item.component, item.layer])
            nodes.append(item)
            continue
        component = COMPONENTS[item]
        for (name, layer), shape in shapes.items():
            if name != item:
                continue
            size = dict(zip(component.axes, shape, strict=True))
            split = component.by_position if by_position is None else by_position
            for position in range(size["pos"]) if split else [None]:
                for head in range(size["head"]) if "head" in size else [None]:
                    nodes.append(Node(name, layer, position, head))
    return nodes


def _check(node: Node, shape: tuple[int, ...]) -> None:
    """Refuse a node whose position, head or neuron does not fit the activation."""
    size = dict(zip(COMPONENTS[node.component].axes, shape, strict=True))
    for axis, index in (("head", node.head), ("neuron", node.neuron)):
        if axis in size and index is None:
            raise ValueError(f"{node}: name the {axis}, as in Node({node.component!r}, {node.layer}, {axis}=0)")
        if axis not in size and index is not None:
            raise ValueError(f"{node}: {node.component!r} has no {axis}s")
    for axis, index in (("pos", node.position), ("head", node.head), ("neuron", node.neuron)):
        if index is not None and not 0 <= index < size[axis]:
            word = {"pos": "position"}.get(axis, axis)
            raise IndexError(f"{node}: there is no {word} {index}, {node.component!r} of block {node.layer} has {size[axis]} of them")
