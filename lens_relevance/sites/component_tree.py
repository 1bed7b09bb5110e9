"""The anatomy of a TransformerBridge: its component tree, walked once, and what each class of component is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge import generalized_components as components
from transformer_lens.model_bridge.generalized_components.vision_classifier_head import VisionClassifierHeadBridge
from transformer_lens.model_bridge.generalized_components.vision_embeddings import VisionEmbeddingsBridge

from lens_relevance.errors import CoverageError
from lens_relevance.sites.anatomy import Anatomy
from lens_relevance.sites.attention import SplitHeads, attention_sites
from lens_relevance.sites.base import Site
from lens_relevance.sites.blocks import bridge_blocks
from lens_relevance.sites.experts import expert_sites
from lens_relevance.sites.linear import linear_sites
from lens_relevance.sites.mlp import fed_by, mlp_sites
from lens_relevance.sites.normalization import decorative_statistics, norm_sites
from lens_relevance.sites.output import output_sites, pooler_sites
from lens_relevance.sites.stacks import bridge_stacks, reads_images
from lens_relevance.sites.token_sets import block_attentions

# Linear layers that are split before use, so that their own HookPoints stay silent (and a router is part of its mixture of experts).
_NEVER_FIRE = ("qkv", "gate_up")
_STATE_SPACE = ("SSMBlockBridge", "SSMMixerBridge", "SSM2MixerBridge", "DepthwiseConv1DBridge")
_EMBEDDINGS = (components.EmbeddingBridge, components.PosEmbedBridge, VisionEmbeddingsBridge)
# Components that only carry tensors around or are linear in them.
_TRANSPARENT = (*_EMBEDDINGS, components.RotaryEmbeddingBridge, components.BlockBridge, components.T5BlockBridge)


def bridge_anatomy(model: TransformerBridge) -> Anatomy:
    """The sites of a bridge, found by walking its component tree."""
    found, embeddings, fed = Anatomy(), list[str](), dict[str, HookPoint]()
    for name, point in model.hook_dict.items():
        found.aliases[name] = str(point.name)
        found.points[str(point.name)] = point
    for name in found.points:
        found.aliases.setdefault(name, name)
    below_the_start = ("vision_encoder", "vision_projector") if reads_images(model) else ()  # of the graph
    for name, component in _components(model, without=below_the_start):
        try:
            sites = _sites_of(name, component)
            fed |= fed_by(name, component)
            for site in sites:
                site.component, site.inputs = component, (fed[site.name],) if site.name in fed else site.inputs
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
    found.blocks = bridge_blocks(model)
    found.attentions = block_attentions(found.points, found.aliases, [block.path for block in found.blocks if block.adds_inside])
    return found


def _components(module: nn.Module, *, path: str = "", without: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Bridge components by path, parents first, without what they wrap and without what has one of these names."""
    for name, child in module.named_children():
        if name == "_original_component" or name in without or isinstance(child, HookPoint):
            continue
        here = f"{path}.{name}" if path else name
        if isinstance(child, components.base.GeneralizedComponent):
            yield here, child
            if not isinstance(child, components.MoEBridge) or child.bound_dense:  # a mixture of experts is one operation
                yield from _components(child, path=here, without=without)
        elif isinstance(child, nn.ModuleList):
            yield from _components(child, path=here, without=without)


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
