"""Perturbation tests: remove tokens or patches in the order of an attribution and follow the target."""

from analyses.methods import by_attention, by_ruleset
from analyses.perturbation.attributions import Attribution, against, attribution, occlusion, passes, random_order
from analyses.perturbation.curves import curves_of, curves_view, perturbation_curves
from analyses.perturbation.images import image_curves
from analyses.perturbation.inputs import EMBEDDING_BASELINES, PATCH_BASELINES, EmbeddingRemoval, PatchRemoval
from analyses.perturbation.removal import areas, removal_curves, summary
from analyses.perturbation.text import BASELINES, TextRemoval

__all__ = [
    "BASELINES",
    "EMBEDDING_BASELINES",
    "PATCH_BASELINES",
    "Attribution",
    "EmbeddingRemoval",
    "PatchRemoval",
    "TextRemoval",
    "against",
    "areas",
    "attribution",
    "by_attention",
    "by_ruleset",
    "curves_of",
    "curves_view",
    "image_curves",
    "occlusion",
    "passes",
    "perturbation_curves",
    "random_order",
    "removal_curves",
    "summary",
]
