"""Estimates of activation patching: what every component would do if it were patched, from a few backward passes, behind one signature.

The estimate of a component is sum of (a_clean - a_corrupt) * g, g the coefficient that a method delivers at its activation a:

| method | g | passes per pair |
|---|---|---|
| a ruleset | the coefficient under it; `gradient` is attribution patching (Nanda 2023; Syed et al. 2023) | 2 forwards, 1 backward |
| `atp_star` | the gradient; for q and k the softmax is recomputed (AtP*, Kramar et al. 2024) | 4, 1 |
| `eap_ig` | gradient averaged over embeddings between corrupt and clean (EAP-IG-inputs, Hanna et al. 2024) | steps + 2, steps |
| `conductance` | integrated gradients of hidden units: g and the change of a, step by step (Dhamdhere et al. 2018) | steps + 3, steps + 1 |
| `direct_logit_attribution` | gradient at the final residual, norm held constant: what is written straight to the logits | 3, 1 |
| `weighted_accumulation`, ... | heads only, no pair: what token-to-token relevance passes through a head of the clean prompt | 1, 1 |

Positive: the component carries what makes the metric of the clean run larger. `run` chooses where g is taken: on the corrupt run (as
TransformerLens does; estimates denoising), on the clean run (estimates noising), or the mean of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from analyses.methods.atp_star import atp_star
from analyses.methods.attention import by_attention
from analyses.methods.base import POINTS, Component, Estimator, Run, Scores, collect, points
from analyses.methods.direct import direct_logit_attribution
from analyses.methods.integrated import DEFAULT_STEPS, conductance, eap_ig
from analyses.methods.rules import by_ruleset
from lens_relevance import RelevanceError
from lens_relevance.attention_methods import METHODS as ATTENTION_METHODS
from lens_relevance.ruleset_tables import rulesets

SPECIAL: dict[str, Callable[[], Estimator]] = {
    "atp_star": atp_star,
    "eap_ig": eap_ig,
    "conductance": conductance,
    "direct_logit_attribution": direct_logit_attribution,
    **{name: partial(by_attention, name) for name in ATTENTION_METHODS},
}
"""Methods that are more than a ruleset, with their default number of steps."""


def estimator(method: str | Estimator) -> Estimator:
    """A method by name: a ruleset (`deeplift`, `relp`, `attnlrp`, `gradient`, ...) or one of `SPECIAL`; an Estimator is taken as it is."""
    if isinstance(method, Estimator):
        return method
    if method in SPECIAL:
        return SPECIAL[method]()
    if method in rulesets():
        return by_ruleset(method)
    raise RelevanceError(f"unknown method {method!r}; choose one of {', '.join([*rulesets(), *SPECIAL])}")


__all__ = [
    "DEFAULT_STEPS",
    "POINTS",
    "SPECIAL",
    "Component",
    "Estimator",
    "Run",
    "Scores",
    "atp_star",
    "by_attention",
    "by_ruleset",
    "collect",
    "conductance",
    "direct_logit_attribution",
    "eap_ig",
    "estimator",
    "points",
]
