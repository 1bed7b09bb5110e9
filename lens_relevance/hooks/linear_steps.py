"""A gradient pulled back through a few steps of autograd's graph, from one HookPoint to those before it, and no further."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from functools import cache
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its outputs

# Steps that are functions of the one tensor that they are handed, which may be a part of another one, beside weights.
_OF_ONE_TENSOR = {
    *("Addmm", "Mm", "Linear", "NativeLayerNorm", "Convolution"),
    *("View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Unsqueeze", "Squeeze", "Expand", "Alias", "Clone", "ToCopy"),
    *("Split", "SplitWithSizes", "Slice", "Select", "Unbind"),
    *("Pow", "Mean", "Sqrt", "Rsqrt", "Relu", "Gelu", "Silu", "Tanh", "Sigmoid", "Softmax"),
}


def edge_of(x: Tensor) -> Edge:
    """Where a tensor that requires a gradient has come from."""
    if x.grad_fn is None:  # a leaf
        return get_gradient_edge(x).node, 0
    return x.grad_fn, x.output_nr


def pulled_back(start: Edge, upstream: Tensor, stops: Container[Edge]) -> dict[Edge, Tensor]:
    """The gradient at every edge in `stops` that `start` is computed from without passing another one of them."""
    arriving: dict[Any, dict[int, Tensor]] = {start[0]: {start[1]: upstream}}
    found: dict[Edge, Tensor] = {}
    for node in reversed(list(_children_first(start[0], stops))):
        for edge, gradient in zip(node.next_functions, _gradients(node, arriving.pop(node, {})), strict=False):
            if gradient is None or edge[0] is None:
                continue
            gradient = _fitted(gradient, edge)
            if edge in stops:
                found[edge] = found[edge] + gradient if edge in found else gradient
            else:
                there = arriving.setdefault(edge[0], {})
                there[edge[1]] = there[edge[1]] + gradient if edge[1] in there else gradient
    return found


def reached(start: Edge, stops: Container[Edge]) -> set[Edge]:
    """The edges in `stops` that `start` is computed from without passing another one of them."""
    nodes = _children_first(start[0], stops)
    return {edge for node in nodes for edge in node.next_functions if edge in stops}


def keeps_gradients_whole(start: Edge, stops: Container[Edge]) -> bool:
    """Whether no step between the stops and `start` can pass on a value without its gradient."""
    size = _size(start)
    return all(_keeps_whole(node, size) for node in _children_first(start[0], stops))


def _keeps_whole(node: Any, size: int) -> bool:
    """Whether a step has nothing beside the graph that could be a detached copy of what is on it; size: of what is computed in the end."""
    name, edges = _step(node.name()), [edge for edge in node.next_functions if edge[0] is not None]
    if name == "Bmm":
        return len(edges) == 2
    if name == "Mul":  # by a number or a weight of the last dimension; the scale of each row may come from what is on the graph
        constant = None if len(edges) == 2 else node._saved_self if node.next_functions[0][0] is None else node._saved_other
        return constant is None or constant.ndim == 0 or constant.ndim == 1 < len(node._input_metadata[0].shape)
    if name == "Add":  # of a norm's eps to a statistic of each row
        return len(edges) == 2 or _size((node, 0)) < size
    if name == "Cat":  # with what is empty, such as a cache of keys and values, or with what is on the graph too
        return sum(map(_size, edges)) == _size((node, 0))
    return name in _OF_ONE_TENSOR


@cache  # asked for every node, of which there are few kinds
def _step(name: str) -> str:
    """A step's name without what autograd adds to it ("MulBackward0")."""
    return re.sub(r"Backward\d$", "", name)


def _size(edge: Edge) -> int:
    return math.prod(edge[0]._input_metadata[edge[1]].shape)


def _children_first(root: Any, stops: Container[Edge]) -> Iterator[Any]:
    """The nodes below a node down to the stops, each after all that it is computed from."""
    seen, stack = {root}, [(root, iter(root.next_functions))]
    while stack:
        node, rest = stack[-1]
        edge = next(rest, None)
        if edge is None:
            stack.pop()
            yield node
        elif edge[0] is not None and edge[0] not in seen and edge not in stops:
            seen.add(edge[0])
            stack.append((edge[0], iter(edge[0].next_functions)))


def _fitted(gradient: Tensor, edge: Edge) -> Tensor:
    """A gradient summed over what was broadcast, and in the dtype that it belongs to, as autograd's engine does between two nodes."""
    expected = edge[0]._input_metadata[edge[1]]
    shape = tuple(expected.shape)
    return (gradient if gradient.shape == shape else gradient.sum_to_size(shape)).to(expected.dtype)


def _gradients(node: Any, arrived: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """What a node passes on, for the gradients at its outputs; nothing for a leaf, where the graph ends."""
    if not arrived or not node.next_functions:
        return ()
    upstream = [arrived.get(i) for i in range(len(node._input_metadata))]
    passed = node(*upstream) if callable(node) else node.apply(*upstream)
    return passed if isinstance(passed, tuple) else (passed,)
