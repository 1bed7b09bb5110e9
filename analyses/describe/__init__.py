"""What a component does: where a head looks and what it writes, when a neuron fires, and how heads score on known patterns."""

from analyses.describe.attention_patterns import pattern_scores
from analyses.describe.direct_logits import DirectLogits
from analyses.describe.head_descriptions import HeadDescription, describe_head
from analyses.describe.neuron_descriptions import NeuronDescription, describe_neuron
from analyses.describe.written_by_units import Written, written_tokens

__all__ = [
    "DirectLogits",
    "HeadDescription",
    "NeuronDescription",
    "Written",
    "describe_head",
    "describe_neuron",
    "pattern_scores",
    "written_tokens",
]
