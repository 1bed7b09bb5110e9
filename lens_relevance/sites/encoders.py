"""Bridges over BERT encoders that TransformerLens would take for masked language models: classifiers, and encoders without a head."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, PreTrainedModel

from lens_relevance.errors import RelevanceError

ENCODERS: dict[str, type[PreTrainedModel]] = {
    model_class.__name__: model_class for model_class in (BertModel, BertForSequenceClassification, BertForTokenClassification)
}
_MASKED_LANGUAGE_MODEL = ("mlm_head", "unembed", "ln_final")


def bridge_encoder(model: PreTrainedModel, tokenizer: Any = None) -> TransformerBridge:
    """A TransformerBridge over a BertModel, BertForSequenceClassification or BertForTokenClassification of Hugging Face's.

    Args:
        model: one of these. It is changed in place, as by any bridge: its modules become HookPoints.
        tokenizer: of the model, or None where it is given token ids alone.

    Returns:
        A bridge whose output are class logits ([batch, class], or [batch, pos, class] for tokens), or the last hidden state
        [batch, pos, d_model] of an encoder without a head.

    Raises:
        RelevanceError: the model is of another class.
    """
    if not isinstance(model, tuple(ENCODERS.values())):
        raise RelevanceError(
            f"bridge_encoder knows {', '.join(ENCODERS)}, not {type(model).__name__}; try TransformerBridge.boot_transformers"
        )
    headless = isinstance(model, BertModel)

    def adapt(adapter: ArchitectureAdapter) -> None:
        components: dict[str, Any] = adapter.components
        for name in _MASKED_LANGUAGE_MODEL:
            del components[name]
        if headless:
            for component in components.values():
                component.name = component.name.removeprefix("bert.")
        else:
            components["classifier"] = LinearBridge(name="classifier")

    return build_bridge_from_module(model, "BertForMaskedLM", hf_config=model.config, tokenizer=tokenizer, post_adapter_hook=adapt).eval()
