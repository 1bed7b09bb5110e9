"""The vocabulary of all analyses: kinds of components, single nodes of a model, and how both are written.

| component | also accepted | what it is | a node in text |
|---|---|---|---|
| `resid` | `resid_pre` | residual stream that enters a block | `L3.resid` |
| `resid_mid` | | residual stream after attention | `L3.resid_mid` |
| `resid_post` | | residual stream that leaves a block | `L3.resid_post` |
| `attn` | `attn_out` | what attention adds to the residual stream | `L3.attn` |
| `mlp` | `mlp_out` | what the MLP adds to the residual stream | `L3.mlp` |
| `heads` | `z`, `head` | output of a head, before the output matrix | `L3H5` |
| `q`, `k`, `v` | | queries, keys and values of a head | `L3H5.q` |
| `pattern` | | attention pattern of a head | `L3H5.pattern` |
| `neurons` | `neuron` | MLP neurons, after the activation function | `L9N1841` |
| `features` | `feature` | features of a dictionary (sparse autoencoder, transcoder) | `L9F17` |

Every function that takes a component takes any of its names; tables use the first one. A position follows after an at sign: `L3.resid@7`,
`L3H5@7`. Graphs and circuits also speak of `embed`, `pos_embed`, `bias`, `logits` and the input of an MLP, `L3.mlp.in`. Graphs over
features speak of what a dictionary misses (`L9.error`), of its skip connection (`L9.skip`) and of all features that are no nodes of their
own (`L9.features`); graphs that other tools wrote, of the logits of single tokens (`logit 1207`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from lens_relevance.errors import RelevanceError

Run = Literal["corrupt", "clean", "mean", "both"]
"""Where coefficients are taken: in the corrupt run, in the clean run, or the mean of the two. `both` is another word for `mean`."""

Direction = Literal["denoising", "noising", "mean"]
"""Which run is patched: the corrupt one with clean values, the clean one with corrupt values, or the mean of both effects."""


@dataclass(frozen=True)
class Component:
    """A kind of component that every block of a model has, and where its value is found.

    Attributes:
        name: the name in tables.
        label: what it is, in words.
        read: HookPoint within a block that holds its value.
        axes: what each axis of that value is.
        write: HookPoint within a block where it is set; the one that is read where none is given.
        by_position: whether patching takes it position by position unless told otherwise, as is usual in the field.
        aliases: other names that are accepted.
    """

    name: str
    label: str
    read: str
    axes: tuple[str, ...]
    write: str = ""
    by_position: bool = False
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "write", self.write or self.read)

    def read_at(self, layer: int) -> str:
        """The HookPoint that holds its value in a layer."""
        return f"blocks.{layer}.{self.read}"

    def write_at(self, layer: int) -> str:
        """The HookPoint where it is set in a layer."""
        return f"blocks.{layer}.{self.write}"

    @property
    def index(self) -> Literal["position", "head", "neuron"]:
        """What tells the nodes of one layer apart when a component is scored."""
        return "head" if "head" in self.axes else "neuron" if "neuron" in self.axes else "position"


_STREAM = ("batch", "pos", "d_model")
_HEADS = ("batch", "pos", "head", "d_head")

COMPONENTS: dict[str, Component] = {
    one.name: one
    for one in (
        Component("resid", "residual stream", "hook_resid_pre", _STREAM, by_position=True, aliases=("resid_pre",)),
        # hook_resid_mid sits on the branch into the MLP: setting it leaves the residual connection as it was. What attention adds to the
        # stream reaches both, so the stream is set there.
        Component("resid_mid", "residual stream after attention", "hook_resid_mid", _STREAM, write="hook_attn_out", by_position=True),
        Component("resid_post", "residual stream after the block", "hook_resid_post", _STREAM, by_position=True),
        Component("attn", "attention output", "hook_attn_out", _STREAM, by_position=True, aliases=("attn_out",)),
        Component("mlp", "MLP output", "hook_mlp_out", _STREAM, by_position=True, aliases=("mlp_out",)),
        Component("heads", "heads", "attn.hook_z", _HEADS, aliases=("z", "head")),
        Component("q", "queries", "attn.hook_q", _HEADS),
        Component("k", "keys", "attn.hook_k", _HEADS),
        Component("v", "values", "attn.hook_v", _HEADS),
        Component("pattern", "attention patterns", "attn.hook_pattern", ("batch", "head", "pos", "key")),
        Component("neurons", "neurons", "mlp.hook_post", ("batch", "pos", "neuron"), aliases=("neuron",)),
    )
}
"""Every component by name. Under grouped-query attention k and v count key-value heads. The pos of a pattern is its query."""

SCORED = ("resid", "attn", "mlp", "heads", "q", "k", "v", "neurons")
"""Components that attribution methods score."""

SOURCES = ("embed", "pos_embed", "bias")
LOGITS, MLP_INPUT = "logits", "mlp.in"
FEATURES, ERROR, SKIP = "features", "error", "skip"
_READERS = ("q", "k", "v", "pattern")
_ALIASES = {alias: one.name for one in COMPONENTS.values() for alias in (one.name, *one.aliases)} | {"feature": FEATURES}


def resolve_component(name: str) -> Component:
    """The component of this name or alias.

    Raises:
        RelevanceError: there is none.
    """
    if name not in _ALIASES:
        raise RelevanceError(f"unknown component {name!r}; there are {', '.join(COMPONENTS)}")
    return COMPONENTS[_ALIASES[name]]


@dataclass(frozen=True, order=True)
class Node:
    """One component of one layer, of one head, neuron or feature where it has these, at one position or (None) at all of them.

    Attributes:
        component: its name; an alias is replaced by the name. `embed`, `pos_embed`, `bias` and `logits` belong to no layer (-1).
        position: of a pattern, that of the query.
        token: of the logit of one token; None for `logits`, whatever the target reads of them.
    """

    component: str
    layer: int = -1
    position: int | None = None
    head: int | None = None
    neuron: int | None = None
    feature: int | None = None
    token: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "component", _ALIASES.get(self.component, self.component))

    def __str__(self) -> str:
        if self.token is not None:
            name = f"logit {self.token}"
        elif self.component in (*SOURCES, LOGITS):
            name = self.component
        elif self.neuron is not None:
            name = f"L{self.layer}N{self.neuron}"
        elif self.feature is not None:
            name = f"L{self.layer}F{self.feature}"
        elif self.head is not None:
            name = f"L{self.layer}H{self.head}" + ("" if self.component == "heads" else f".{self.component}")
        else:
            name = f"L{self.layer}.{self.component}"
        return name if self.position is None else f"{name}@{self.position}"

    @property
    def owner(self) -> Node:
        """The head or MLP that an input belongs to (`L4H1.q` -> `L4H1`, `L4.mlp.in` -> `L4.mlp`); any other node itself."""
        if self.component in _READERS:
            return replace(self, component="heads")
        return replace(self, component="mlp") if self.component == MLP_INPUT else self


_HEAD = rf"H(?P<head>\d+)(?:\.(?P<reader>{'|'.join(_READERS)}))?"
_WITHOUT_INDEX = [one.name for one in COMPONENTS.values() if one.index == "position"] + [MLP_INPUT, FEATURES, ERROR, SKIP]
_LAYER_WIDE = "|".join(re.escape(name) for name in _WITHOUT_INDEX)
_TEXT = re.compile(
    rf"(?:(?P<outside>{'|'.join((*SOURCES, LOGITS))})|logit (?P<token>\d+)|L(?P<layer>\d+)"
    rf"(?:{_HEAD}|N(?P<neuron>\d+)|F(?P<feature>\d+)|\.(?P<wide>{_LAYER_WIDE})))"
    r"(?:@(?P<position>\d+))?"
)


def find_node(text: str) -> Node | None:
    """The node that a text names, as `str(node)` writes it; None where it names none (a group of nodes, say)."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    indexed = "neurons" if match["neuron"] else FEATURES if match["feature"] else LOGITS if match["token"] else "heads"
    name = match["outside"] or match["wide"] or match["reader"] or indexed
    numbers = match.group("layer", "position", "head", "neuron", "feature", "token")
    layer, position, head, neuron, feature, token = (None if part is None else int(part) for part in numbers)
    return Node(name, -1 if layer is None else layer, position, head, neuron, feature, token)


def parse_node(text: str) -> Node:
    """The node that a text names, as `str(node)` writes it.

    Raises:
        RelevanceError: it names none.
    """
    node = find_node(text)
    if node is None:
        raise RelevanceError(f"{text!r} names no node; nodes are written like L3H5, L3H5.q, L3.mlp, L9N1841, L3.resid@7, embed or logits")
    return node


def owner(name: str) -> str:
    """`Node.owner` of a node in text; names of another form (groups) as they are."""
    node = find_node(name)
    return name if node is None else str(node.owner)


def resolve_run(run: str) -> Literal["corrupt", "clean", "mean"]:
    """A run by its one name.

    Raises:
        RelevanceError: it is none of `Run`.
    """
    if run in ("mean", "both"):
        return "mean"
    if run == "corrupt" or run == "clean":
        return run  # type: ignore[return-value]  # mypy does not narrow a str by ==
    raise RelevanceError(f"run is 'corrupt', 'clean' or 'mean' (of both), not {run!r}")


def resolve_direction(direction: str) -> Direction:
    """A direction of patching.

    Raises:
        RelevanceError: it is none of `Direction`.
    """
    if direction not in ("denoising", "noising", "mean"):
        raise RelevanceError(f"direction is denoising, noising or mean (of both), not {direction!r}")
    return direction  # type: ignore[return-value]  # mypy does not narrow a str by membership
