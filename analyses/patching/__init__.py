"""Activation patching, ablation and path patching: what the estimates of relevance are measured against."""

from analyses.patching.activation import ablation, activation_patching
from analyses.patching.nodes import COMPONENTS, Component, Node
from analyses.patching.paths import PathPatchingResult, path_patching
from analyses.patching.results import Direction, PatchedRuns, PatchingResult

__all__ = [
    "COMPONENTS",
    "Component",
    "Direction",
    "Node",
    "PatchedRuns",
    "PatchingResult",
    "PathPatchingResult",
    "ablation",
    "activation_patching",
    "path_patching",
]
