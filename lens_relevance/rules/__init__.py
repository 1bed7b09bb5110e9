"""Rules and operations: pure torch, no model. One file per kind of operation, with the rules that are made for it."""

from lens_relevance.rules.activation import Activation, ElementwiseRule, Identity, KnownFunction, Rescale, SoftCap
from lens_relevance.rules.attention import AttentionGeometry, CappedScoresRule, Mix, Scores, by_head, cap_slope
from lens_relevance.rules.base import Operation, Reference, Rule
from lens_relevance.rules.expert_weights import Expert, Router
from lens_relevance.rules.experts import Experts, ExpertsRule
from lens_relevance.rules.gated import ClampedGate, GatedActivation, GatedRule
from lens_relevance.rules.linear import Convolution, EpsilonRule, GammaRule, Linear, LinearOperation, LinearRule, ZeroRule, ZPlusRule
from lens_relevance.rules.normalization import (
    LNRule,
    Norm,
    NormDivide,
    NormIdentity,
    NormRule,
    NormScale,
    NormWeight,
    PairLN,
    PairNorm,
    passes_steps,
)
from lens_relevance.rules.product import ConstantFirstFactor, ConstantOutput, Half, PairProduct, Product, ProductRule, Scale
from lens_relevance.rules.softmax import PairSoftmax, Softmax, SoftmaxIdentity, SoftmaxRule, SoftmaxTemperature

__all__ = [
    "Activation",
    "AttentionGeometry",
    "CappedScoresRule",
    "ClampedGate",
    "ConstantFirstFactor",
    "ConstantOutput",
    "Convolution",
    "ElementwiseRule",
    "EpsilonRule",
    "Expert",
    "Experts",
    "ExpertsRule",
    "GammaRule",
    "GatedActivation",
    "GatedRule",
    "Half",
    "Identity",
    "KnownFunction",
    "LNRule",
    "Linear",
    "LinearOperation",
    "LinearRule",
    "Mix",
    "Norm",
    "NormDivide",
    "NormIdentity",
    "NormRule",
    "NormScale",
    "NormWeight",
    "Operation",
    "PairLN",
    "PairNorm",
    "PairProduct",
    "PairSoftmax",
    "Product",
    "ProductRule",
    "Reference",
    "Rescale",
    "Router",
    "Rule",
    "Scale",
    "Scores",
    "SoftCap",
    "Softmax",
    "SoftmaxIdentity",
    "SoftmaxRule",
    "SoftmaxTemperature",
    "ZPlusRule",
    "ZeroRule",
    "by_head",
    "cap_slope",
    "passes_steps",
]


def __getattr__(name: str) -> object:
    if name == "Constant":
        raise ImportError(
            "`Constant` meant two rules, which have their own names now: `ConstantFirstFactor()` for `gate` and `router` (the first factor "
            "of the product is a constant), `ConstantOutput` for `pattern`, `z` and any other operation (nothing passes it)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
