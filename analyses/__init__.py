"""Analyses on top of lens_relevance: rank components, hold them against activation patching, and show what was found."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyses.circuits import faithfulness_table
    from analyses.describe import describe_head, describe_neuron
    from analyses.evaluation.comparison import compare_with_patching
    from analyses.evaluation.ranking import rank_heads, rank_neurons, rank_positions
    from analyses.graph import flow_graph
    from analyses.interventions import intervene, set_units
    from analyses.methods import Estimator, conductance, direct_logit_attribution, eap_ig
    from analyses.models.encoders import bridge_encoder
    from analyses.models.loading import load_model
    from analyses.patching import ablation, activation_patching
    from analyses.tasks import PromptPairs

# The command line answers --help from this package too, so torch and transformers are imported when they are asked for.
_HOME = {
    "Estimator": "methods",
    "PromptPairs": "tasks",
    "ablation": "patching",
    "activation_patching": "patching",
    "bridge_encoder": "models.encoders",
    "compare_with_patching": "evaluation.comparison",
    "conductance": "methods",
    "describe_head": "describe",
    "describe_neuron": "describe",
    "direct_logit_attribution": "methods",
    "eap_ig": "methods",
    "faithfulness_table": "circuits",
    "flow_graph": "graph",
    "intervene": "interventions",
    "load_model": "models.loading",
    "rank_heads": "evaluation.ranking",
    "rank_neurons": "evaluation.ranking",
    "rank_positions": "evaluation.ranking",
    "set_units": "interventions",
}

__all__ = [
    "Estimator",
    "PromptPairs",
    "ablation",
    "activation_patching",
    "bridge_encoder",
    "compare_with_patching",
    "conductance",
    "describe_head",
    "describe_neuron",
    "direct_logit_attribution",
    "eap_ig",
    "faithfulness_table",
    "flow_graph",
    "intervene",
    "load_model",
    "rank_heads",
    "rank_neurons",
    "rank_positions",
    "set_units",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
