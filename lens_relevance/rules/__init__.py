"""Rules and operations: pure torch, no model. One file per kind of operation."""

from lens_relevance.rules.activation import Activation, Gated, GatedActivation, Identity, Rescale, SoftCap
from lens_relevance.rules.attention import (
    Constant,
    Half,
    PairProduct,
    PairSoftmax,
    Scale,
    SoftmaxTemperature,
    UniformScores,
)
from lens_relevance.rules.attention_steps import AttentionGeometry, Mix, Scores, Softmax
from lens_relevance.rules.base import Operation, Reference, Rule
from lens_relevance.rules.clamped_gate import ClampedGate
from lens_relevance.rules.experts import Expert, Experts, Router
from lens_relevance.rules.linear import EpsilonRule, GammaRule, Linear, ZeroRule
from lens_relevance.rules.normalization import LNRule, Norm, NormDivide, NormScale, NormWeight, PairLN, PairNorm
from lens_relevance.rules.routing import ExpertsRule

__all__ = [
    "Activation",
    "AttentionGeometry",
    "ClampedGate",
    "Constant",
    "EpsilonRule",
    "Expert",
    "Experts",
    "ExpertsRule",
    "GammaRule",
    "Gated",
    "GatedActivation",
    "Half",
    "Identity",
    "LNRule",
    "Linear",
    "Mix",
    "Norm",
    "NormDivide",
    "NormScale",
    "NormWeight",
    "Operation",
    "PairLN",
    "PairNorm",
    "PairProduct",
    "PairSoftmax",
    "Reference",
    "Rescale",
    "Router",
    "Rule",
    "Scale",
    "Scores",
    "Softmax",
    "SoftCap",
    "SoftmaxTemperature",
    "UniformScores",
    "ZeroRule",
]
