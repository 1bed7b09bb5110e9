"""What a component does: where a head looks and what it writes, when a neuron fires, and how heads score on known patterns."""

from analyses.components.describe import HeadDescription, NeuronDescription, describe_head, describe_neuron
from analyses.components.direct_logits import DirectLogits
from analyses.components.pattern_scores import pattern_scores

__all__ = ["DirectLogits", "HeadDescription", "NeuronDescription", "describe_head", "describe_neuron", "pattern_scores"]
