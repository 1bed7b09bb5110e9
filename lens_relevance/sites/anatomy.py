"""The anatomy of a model: all its sites, its HookPoints by name, and what has no site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformer_lens.hook_points import HookPoint

from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.sites.attention import SplitHeads
from lens_relevance.sites.base import Site, block_of
from lens_relevance.sites.blocks import Block
from lens_relevance.sites.stacks import CROSS, Roles, Stacks
from lens_relevance.sites.token_sets import DECODER, ENCODER, TOKENS, TokenAttention


@dataclass
class Anatomy:
    """Sites and HookPoints of one model.

    Attributes:
        sites: every operation that a rule can be chosen for.
        points: from the canonical name of a HookPoint to the HookPoint.
        aliases: from any name that TransformerLens accepts to the canonical one.
        uncovered: from the path of a component to the reason why it has no site.
        decorative: names of HookPoints that hold something else than their name says, or whose tensors the model does not use.
        stacks: names of HookPoints by stack and role, and the complete cuts.
        attentions: which token set attends to which, in the order of computation.
        blocks: those of a bridge with one stack of them.
        conversions: to a layout by heads and back, where TransformerLens's own conversion takes another number of heads.
        is_declared: whether these are the sites of a model of the user's own, of which linear steps need none.
    """

    sites: list[Site] = field(default_factory=list)
    points: dict[str, HookPoint] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    decorative: set[str] = field(default_factory=set)
    stacks: Stacks = field(default_factory=Stacks)
    attentions: list[TokenAttention] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    conversions: dict[str, SplitHeads] = field(default_factory=dict)
    is_declared: bool = False

    @property
    def inside_experts(self) -> list[HookPoint]:
        """HookPoints inside mixtures of experts, each of which is one site as a whole."""
        mixtures = [site for site in self.sites if site.kind == "experts"]
        names, ends = tuple(f"{site.name}." for site in mixtures), {p for site in mixtures for p in (*site.inputs, site.output)}
        return [point for name, point in self.points.items() if name.startswith(names) and point not in ends]

    def conversion(self, name: str) -> Any:
        """From a HookPoint's raw tensor to TransformerLens's layout (`convert`) and back (`revert`), or None where they are the same."""
        return self.conversions.get(name, self.points[name].hook_conversion)

    @property
    def leaves(self) -> list[str]:
        """HookPoints at which the graph starts."""
        return [name for roles in self.stacks.roles.values() for name in roles["embeddings"]]

    @property
    def layout(self) -> Roles:
        """Names of HookPoints by role, of a model with one stack.

        Raises:
            CoverageError: the model has several.
        """
        if set(self.stacks.roles) - {TOKENS}:
            listed = ", ".join(self.stacks.roles)
            raise CoverageError(f"this analysis knows models with one stack of blocks, and this one has {listed}; use propagate(...)")
        return self.stacks.roles[TOKENS]

    @property
    def n_layers(self) -> int:
        """Layers of a model with one stack; 0 where none are known, or where there are several stacks."""
        return max(len(self.stacks.roles[TOKENS]["residual"]) - 1, 0) if set(self.stacks.roles) == {TOKENS} else 0

    def stack_of(self, name: str) -> str:
        """The stack whose positions a HookPoint has."""
        if set(self.stacks.roles) == {TOKENS}:
            return TOKENS
        owner = next((stack for stack, roles in self.stacks.roles.items() if any(name in names for names in roles.values())), "")
        if owner or CROSS not in self.stacks.roles:
            return DECODER if owner == CROSS else owner  # heads between the two write at the decoder's positions
        if ".cross_attn.k." in name or ".cross_attn.v." in name:
            return ENCODER
        return DECODER if name.startswith(("decoder_", "unembed")) else ENCODER

    def count_layers(self) -> None:
        """Tell each site in a block how many blocks its stack has, so that a ruleset can count them from the end."""
        last: dict[str, int] = {}
        for name in (*self.points, *(site.name for site in self.sites)):
            stack, layer = block_of(name)
            if layer is not None:
                last[stack] = max(last.get(stack, 0), layer)
        for site in self.sites:
            site.n_layers = None if site.layer is None else last[site.stack] + 1

    def canonical(self, name: str) -> str:
        """The canonical name of a HookPoint given by any of its names.

        Raises:
            RelevanceError: there is no such HookPoint.
        """
        if name in self.aliases:
            return self.aliases[name]
        close = [n for n in self.aliases if name.rsplit(".", 1)[-1] in n][:5]
        hint = f" Did you mean one of {', '.join(close)}?" if close else " model.hook_dict lists the names."
        raise RelevanceError(f"unknown HookPoint {name!r}.{hint}")

    def add(self, site: Site) -> None:
        """Add a site. It takes the place of the one with the same output, and of the steps of a component that this was the whole of.

        Raises:
            RelevanceError: another site has its name, at other HookPoints.
        """
        same = [s for s in self.sites if s.output is not None and s.output is site.output]
        whole = {s.name for s in same if ":" not in s.name}
        kept = [s for s in self.sites if s not in same and s.name.split(":")[0] not in whole]
        taken = next((s for s in kept if s.name == site.name), None)
        if taken is not None:
            raise RelevanceError(f"this model has a site named {site.name!r} already ({taken.points}); give the new one another name")
        site.component = same[0].component if same else None
        at = self.sites.index(same[0]) if same else len(self.sites)
        before = sum(s in kept for s in self.sites[:at])
        self.sites = [*kept[:before], site, *kept[before:]]
        self.uncovered.pop(site.name.split(":")[0], None)
        self.decorative -= {str(point.name) for point in (*site.inputs, site.output) if point is not None}
