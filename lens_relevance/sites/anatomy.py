"""The anatomy of a model: all its sites, its HookPoints by name, and what has no site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import generalized_components as components

from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.sites.attention import attention_sites
from lens_relevance.sites.base import Site
from lens_relevance.sites.experts import expert_sites
from lens_relevance.sites.linear import linear_sites
from lens_relevance.sites.mlp import mlp_sites
from lens_relevance.sites.normalization import norm_sites
from lens_relevance.sites.output import output_sites

# Components that only carry tensors around or are linear in them.
# Linear layers that are split before use, so that their own HookPoints stay silent (and a router is part of its mixture of experts).
_NEVER_FIRE = ("qkv", "gate_up")
_TRANSPARENT = ("EmbeddingBridge", "PosEmbedBridge", "RotaryEmbeddingBridge")


@dataclass
class Anatomy:
    """Sites and HookPoints of one model.

    points: canonical name -> HookPoint; aliases: any name TransformerLens accepts -> canonical name.
    uncovered: component path -> why it has no site. decorative: names of HookPoints that say one thing and carry another.
    leaves: names of the HookPoints at which the graph starts, token embeddings first, then learned positions.
    layout: names by role, one per layer: `residual` (each block's resid_pre, then the final residual: complete cuts), `z`, `neurons`.
    """

    sites: list[Site] = field(default_factory=list)
    points: dict[str, HookPoint] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    decorative: set[str] = field(default_factory=set)
    leaves: list[str] = field(default_factory=list)
    layout: dict[str, list[str]] = field(default_factory=lambda: {"residual": [], "z": [], "neurons": []})

    @property
    def n_layers(self) -> int:
        return max(len(self.layout["residual"]) - 1, 0)

    def canonical(self, name: str) -> str:
        """The canonical name of a HookPoint given by any of its names."""
        if name in self.aliases:
            return self.aliases[name]
        close = [n for n in self.aliases if name.rsplit(".", 1)[-1] in n][:5]
        hint = f" Did you mean one of {', '.join(close)}?" if close else " model.hook_dict lists the names."
        raise RelevanceError(f"unknown HookPoint {name!r}.{hint}")


def anatomy(model: Any) -> Anatomy:
    """The sites that were declared for a model, or else those found by walking the component tree of a TransformerBridge."""
    if model in _DECLARED:
        return _DECLARED[model]
    if not hasattr(model, "hook_dict") or not hasattr(model, "original_model"):
        raise RelevanceError(
            f"expected a TransformerBridge, got {type(model).__name__}; load one with TransformerBridge.boot_transformers, or "
            "tell where the operations of a model of your own are with lens_relevance.sites.declare_sites"
        )
    found = Anatomy()
    for name, point in model.hook_dict.items():
        found.aliases[name] = str(point.name)
        found.points[str(point.name)] = point
    for name in found.points:
        found.aliases.setdefault(name, name)
    for name, component in _components(model):
        try:
            sites = _sites_of(name, component)
            for site in sites:
                site.component = component
            found.sites += sites
        except CoverageError as error:
            found.uncovered[name] = str(error)
            if isinstance(component, components.AttentionBridge):
                found.decorative |= {str(component.hook_attn_scores.name), str(component.hook_pattern.name)}
        if type(component) in (components.EmbeddingBridge, components.PosEmbedBridge):
            found.leaves.append(str(component.hook_out.name))
    try:
        found.sites += output_sites(model)
    except CoverageError as error:
        found.uncovered["output"] = str(error)
    n = len(model.blocks) if hasattr(model, "blocks") else 0
    if n:
        found.layout["residual"] = [f"blocks.{i}.hook_in" for i in range(n)] + [f"blocks.{n - 1}.hook_out"]
        found.layout["z"] = [f"blocks.{i}.attn.o.hook_in" for i in range(n)]
        found.layout["neurons"] = [f"blocks.{i}.mlp.out.hook_in" for i in range(n)]
    return found


_DECLARED: WeakKeyDictionary[Any, Anatomy] = WeakKeyDictionary()


def remember(model: Any, declared: Anatomy) -> None:
    """Use this anatomy for a model from now on."""
    _DECLARED[model] = declared


def _components(model: Any) -> list[tuple[str, Any]]:
    """Bridge components by path, parents first, without what they wrap."""
    listed: list[tuple[str, Any]] = []

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if name == "_original_component" or isinstance(child, HookPoint):
                continue
            here = f"{path}.{name}" if path else name
            if isinstance(child, components.base.GeneralizedComponent):
                listed.append((here, child))
                walk(child, here)
            elif isinstance(child, nn.ModuleList):
                walk(child, here)

    walk(model, "")
    return listed


def _sites_of(name: str, component: Any) -> list[Site]:
    if isinstance(component, components.NormalizationBridge):
        return norm_sites(name, component)
    if isinstance(component, components.MoERouterBridge) or name.rsplit(".", 1)[-1] in _NEVER_FIRE:
        return []
    if isinstance(component, components.LinearBridge | components.UnembeddingBridge):
        return linear_sites(name, component)
    if isinstance(component, components.AttentionBridge):
        return attention_sites(name, component)
    if isinstance(component, components.MLPBridge):
        return mlp_sites(name, component)
    if isinstance(component, components.MoEBridge):
        return expert_sites(name, component)
    if isinstance(component, components.BlockBridge) or type(component).__name__ in _TRANSPARENT:
        return []
    if type(component).__name__ == "GeneralizedComponent" and isinstance(component.original_component, nn.Identity):
        return []
    raise CoverageError(f"{name}: no site is known for {type(component).__name__}")
