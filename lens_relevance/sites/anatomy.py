"""The anatomy of a model: all its sites, its HookPoints by name, and what has no site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge import generalized_components as components
from transformer_lens.model_bridge.generalized_components.vision_classifier_head import VisionClassifierHeadBridge
from transformer_lens.model_bridge.generalized_components.vision_embeddings import VisionEmbeddingsBridge

from lens_relevance.errors import CoverageError, RelevanceError
from lens_relevance.hooked_model import HookedModel, is_bridge
from lens_relevance.sites.attention import SplitHeads, attention_sites
from lens_relevance.sites.base import Site
from lens_relevance.sites.experts import expert_sites
from lens_relevance.sites.linear import linear_sites
from lens_relevance.sites.mlp import mlp_sites
from lens_relevance.sites.normalization import decorative_statistics, norm_sites
from lens_relevance.sites.output import output_sites, pooler_sites
from lens_relevance.sites.stacks import CROSS, Roles, Stacks, bridge_stacks, reads_images
from lens_relevance.sites.token_sets import DECODER, ENCODER, TOKENS, TokenAttention, block_attentions

# Linear layers that are split before use, so that their own HookPoints stay silent (and a router is part of its mixture of experts).
_NEVER_FIRE = ("qkv", "gate_up")
_STATE_SPACE = ("SSMBlockBridge", "SSMMixerBridge", "SSM2MixerBridge", "DepthwiseConv1DBridge")
_EMBEDDINGS = (components.EmbeddingBridge, components.PosEmbedBridge, VisionEmbeddingsBridge)
# Components that only carry tensors around or are linear in them.
_TRANSPARENT = (*_EMBEDDINGS, components.RotaryEmbeddingBridge, components.BlockBridge, components.T5BlockBridge)


@dataclass
class Anatomy:
    """Sites and HookPoints of one model.

    points: canonical name -> HookPoint; aliases: any name TransformerLens accepts -> canonical name.
    uncovered: component path -> why it has no site. decorative: names of HookPoints that say one thing and carry another.
    stacks: HookPoint names by stack and role, and the complete cuts.
    attentions: which token set attends to which, in the order of computation.
    conversions: to a layout by heads and back, where TransformerLens's own conversion misreads how many heads there are.
    """

    sites: list[Site] = field(default_factory=list)
    points: dict[str, HookPoint] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    decorative: set[str] = field(default_factory=set)
    stacks: Stacks = field(default_factory=Stacks)
    attentions: list[TokenAttention] = field(default_factory=list)
    conversions: dict[str, SplitHeads] = field(default_factory=dict)

    def conversion(self, name: str) -> Any:
        """From a HookPoint's raw tensor to TransformerLens's layout (`convert`) and back (`revert`), or None where they are the same."""
        return self.conversions.get(name, self.points[name].hook_conversion)

    @property
    def leaves(self) -> list[str]:
        """HookPoints at which the graph starts."""
        return [name for roles in self.stacks.roles.values() for name in roles["embeddings"]]

    @property
    def layout(self) -> Roles:
        """HookPoint names by role of a model with one stack; raises CoverageError for one with several."""
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
        if CROSS in self.stacks.roles:
            if ".cross_attn.k." in name or ".cross_attn.v." in name:
                return ENCODER
            return DECODER if name.startswith(("decoder_", "unembed")) else ENCODER
        return next((stack for stack, roles in self.stacks.roles.items() if any(name in names for names in roles.values())), "")

    def canonical(self, name: str) -> str:
        """The canonical name of a HookPoint given by any of its names."""
        if name in self.aliases:
            return self.aliases[name]
        close = [n for n in self.aliases if name.rsplit(".", 1)[-1] in n][:5]
        hint = f" Did you mean one of {', '.join(close)}?" if close else " model.hook_dict lists the names."
        raise RelevanceError(f"unknown HookPoint {name!r}.{hint}")


def anatomy(model: HookedModel) -> Anatomy:
    """The sites that were declared for a model, or else those found by walking the component tree of a TransformerBridge."""
    if model in _DECLARED:
        return _DECLARED[model]
    if not is_bridge(model):
        raise RelevanceError(
            f"expected a TransformerBridge, got {type(model).__name__}; load one with TransformerBridge.boot_transformers, or "
            "tell where the operations of a model of your own are with lens_relevance.sites.declare_sites"
        )
    found, embeddings = Anatomy(), list[str]()
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
                if site.kind == "z" and site.output is not None and isinstance(component, components.MLAAttentionBridge):
                    found.conversions[site.output_name] = SplitHeads(site.operation.geometry.n_heads)  # type: ignore[attr-defined]
            found.sites += sites
        except CoverageError as error:
            found.uncovered[name] = str(error)
            if isinstance(component, components.AttentionBridge):
                found.decorative |= {str(component.hook_attn_scores.name), str(component.hook_pattern.name)}
        if isinstance(component, components.NormalizationBridge) and decorative_statistics(component):
            found.decorative |= {str(component.hook_scale.name), str(component.hook_normalized.name)}
        if type(component) in _EMBEDDINGS:
            embeddings.append(str(component.hook_out.name))
    try:
        found.sites += output_sites(model)
    except CoverageError as error:
        found.uncovered["output"] = str(error)
    found.stacks = bridge_stacks(model, embeddings)
    found.attentions = block_attentions(found.points, found.aliases)
    return found


_DECLARED: WeakKeyDictionary[Any, Anatomy] = WeakKeyDictionary()


def remember(model: HookedModel, declared: Anatomy) -> None:
    """Use this anatomy for a model from now on."""
    _DECLARED[model] = declared


def _components(model: TransformerBridge) -> list[tuple[str, Any]]:
    """Bridge components by path, parents first, without what they wrap."""
    listed: list[tuple[str, Any]] = []

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            if name == "_original_component" or isinstance(child, HookPoint):
                continue
            if name in ("vision_encoder", "vision_projector") and reads_images(model):  # below the start of the graph
                continue
            here = f"{path}.{name}" if path else name
            if isinstance(child, components.base.GeneralizedComponent):
                listed.append((here, child))
                if not isinstance(child, components.MoEBridge) or child.bound_dense:  # a mixture of experts is one operation
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
    if isinstance(component, components.LinearBridge | components.UnembeddingBridge | VisionClassifierHeadBridge):
        return linear_sites(name, component)
    if isinstance(component, components.BertPoolerBridge):
        return pooler_sites(name, component)
    if isinstance(component, components.AttentionBridge):
        return attention_sites(name, component)
    if isinstance(component, components.MLPBridge):
        return mlp_sites(name, component)
    if isinstance(component, components.MoEBridge):
        return expert_sites(name, component)
    if isinstance(component, _TRANSPARENT):
        return []
    if type(component).__name__ == "GeneralizedComponent" and isinstance(component.original_component, nn.Identity):
        return []
    if type(component).__name__ in _STATE_SPACE:
        raise CoverageError(
            f"{name}: a state space model (Mamba) runs its recurrence in one piece, without HookPoints, and the rules for it (MambaLRP, "
            "Jafari et al. 2024) are not implemented"
        )
    raise CoverageError(f"{name}: no site is known for {type(component).__name__}")
