"""Activation patching, ablation and path patching: what the estimates of relevance are measured against."""

from analyses.components import Node
from analyses.patching.activation import ablation, activation_patching
from analyses.patching.paths import PathPatchingResult, path_patching
from analyses.patching.results import PatchedRuns, PatchingResult

__all__ = [
    "Node",
    "PatchedRuns",
    "PatchingResult",
    "PathPatchingResult",
    "ablation",
    "activation_patching",
    "path_patching",
]
