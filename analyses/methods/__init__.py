"""Attribution methods behind one signature: estimates of activation patching from a few passes, by name.

The estimate of a component is sum of (a_clean - a_corrupt) * g, g the coefficient that a method delivers at its activation a:

| method | g | passes per pair |
|---|---|---|
| a ruleset | the coefficient under it; `gradient` is attribution patching (Nanda 2023; Syed et al. 2023) | 2 forwards, 1 backward |
| `atp_star` | the gradient less one layer at a time; q and k by a recomputed softmax (AtP*, Kramar et al. 2024) | 3, 0 + 1, 1 per layer |
| `combined` | between gradient (both runs) and `deeplift`, by kind of component; q and k by `second_order` | 4, 3 |
| `second_order` | the gradient, and half the Hessian times the change; our reading of arXiv 2606.09899 | 4, 1 + 1 per layer |
| `deeplift_shapley` | q, k and v only: what the three do together at a head's output, by Shapley values under `deeplift` | 2, 1 |
| `eap_ig` | gradient averaged over embeddings between corrupt and clean (EAP-IG-inputs, Hanna et al. 2024) | steps + 2, steps |
| `conductance` | integrated gradients of hidden units: g and the change of a, step by step (Dhamdhere et al. 2018) | steps + 3, steps + 1 |
| `direct_logit_attribution` | gradient at the final residual, norm held constant: what is written straight to the logits | 3, 1 |
| `integrated_gradients`, `smoothgrad`, `kernel_shap`, `atman`, `cd_t`, `grad_cam` | single prompts' tokens, patches | many |
| `weighted_accumulation`, ... | heads only, no pair: what token-to-token relevance passes through a head of the clean prompt | 1, 1 |

Positive: the component carries what makes the metric of the clean run larger. `run` chooses where g is taken: on the corrupt run (as
TransformerLens does; estimates denoising), on the clean run (estimates noising), or the mean of the two. Rulesets, `eap_ig` and
`conductance` also score edges; rulesets and token relevance also score the tokens of single prompts. `register_method` adds a method of
your own.
"""

from __future__ import annotations

from functools import partial

from analyses.methods.atman_method import atman
from analyses.methods.atp_star_method import atp_star
from analyses.methods.base import Estimator, Scores, TokenScores, collect, points
from analyses.methods.captum_methods import grad_cam, integrated_gradients, smoothgrad
from analyses.methods.cd_t_method import cd_t
from analyses.methods.combined_method import combined
from analyses.methods.conductance_method import conductance
from analyses.methods.deeplift_shapley_method import deeplift_shapley
from analyses.methods.direct_logit_method import direct_logit_attribution
from analyses.methods.eap_ig_method import eap_ig, integrated_edges
from analyses.methods.kernel_shap_method import kernel_shap
from analyses.methods.registry import estimator, method_names, register_method
from analyses.methods.ruleset_method import by_ruleset
from analyses.methods.second_order_method import second_order
from analyses.methods.token_relevance_method import by_attention
from lens_relevance.attention_methods.methods import ALIASES
from lens_relevance.attention_methods.methods import METHODS as ATTENTION_METHODS

register_method("combined", combined)
register_method("second_order", second_order)
register_method("atp_star", atp_star)
register_method("deeplift_shapley", deeplift_shapley)
register_method("eap_ig", eap_ig)
register_method("conductance", conductance)
register_method("direct_logit_attribution", direct_logit_attribution)
register_method("integrated_gradients", integrated_gradients)
register_method("smoothgrad", smoothgrad)
register_method("kernel_shap", kernel_shap)
register_method("atman", atman)
register_method("grad_cam", grad_cam)
register_method("cd_t", cd_t)
for _name in (*ATTENTION_METHODS, *ALIASES):
    register_method(_name, partial(by_attention, _name))

__all__ = [
    "Estimator",
    "Scores",
    "TokenScores",
    "atman",
    "atp_star",
    "by_attention",
    "by_ruleset",
    "cd_t",
    "collect",
    "combined",
    "conductance",
    "deeplift_shapley",
    "direct_logit_attribution",
    "eap_ig",
    "estimator",
    "grad_cam",
    "integrated_gradients",
    "integrated_edges",
    "kernel_shap",
    "method_names",
    "points",
    "register_method",
    "second_order",
    "smoothgrad",
]
