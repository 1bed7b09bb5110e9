"""What the name of a node in a flow graph says."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(r"L(?P<layer>\d+)(?:H(?P<head>\d+)(?:\.(?P<read>[qkv]))?|(?P<mlp>\.mlp)(?P<mlp_in>\.in)?)")
SOURCES = ("embed", "pos_embed", "bias")
TARGET = "logits"


@dataclass(frozen=True)
class NodeName:
    """component: embed, pos_embed, bias, head, q, k, v, mlp, mlp.in, logits, or group; layer and head are -1 where there is none.

    stage: place in the order of computation; every edge of a graph leads to a higher stage.
    """

    component: str
    layer: int = -1
    head: int = -1
    stage: int = 0


def parse(name: str) -> NodeName:
    """A node's name taken apart. Names of another form are groups of nodes."""
    if name in SOURCES:
        return NodeName(name)
    if name == TARGET:
        return NodeName(TARGET, stage=10**9)
    found = _NAME.fullmatch(name)
    if found is None:
        return NodeName("group")
    layer = int(found["layer"])
    if found["mlp"]:
        return NodeName("mlp.in" if found["mlp_in"] else "mlp", layer, -1, 4 * layer + (3 if found["mlp_in"] else 4))
    return NodeName(found["read"] or "head", layer, int(found["head"]), 4 * layer + (1 if found["read"] else 2))


def owner(name: str) -> str:
    """The component that a reader belongs to (`L4H1.q` -> `L4H1`); other names as they are."""
    return re.sub(r"\.(?:q|k|v|in)$", "", name)
