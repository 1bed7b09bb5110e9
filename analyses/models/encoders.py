"""Bridges over BERT encoders that TransformerLens would take for masked language models: classifiers, and encoders without a head."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import LinearBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from lens_relevance import RelevanceError

ENCODERS = (BertModel, BertForSequenceClassification, BertForTokenClassification)
_MASKED_LANGUAGE_MODEL = ("mlm_head", "unembed", "ln_final")


def bridge_encoder(model: PreTrainedModel, tokenizer: Any = None) -> TransformerBridge:
    """A TransformerBridge over a BertModel, BertForSequenceClassification or BertForTokenClassification of Hugging Face's.

    What the bridge returns are class logits ([batch, class], or [batch, pos, class] for tokens), or the last hidden state
    [batch, pos, d_model] of an encoder without a head. The model is changed in place, as by any bridge: its modules become HookPoints.

    Raises RelevanceError for a model of another class.
    """
    if not isinstance(model, ENCODERS):
        known = ", ".join(c.__name__ for c in ENCODERS)
        raise RelevanceError(f"bridge_encoder knows {known}, not {type(model).__name__}; try TransformerBridge.boot_transformers")
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


def load_encoder(source: str, config: PreTrainedConfig, dtype: torch.dtype, device: str | None) -> TransformerBridge | None:
    """A folder or hub name whose config names one of `ENCODERS`; None for any other, which TransformerLens loads itself."""
    named = getattr(config, "architectures", None) or []
    model_class: Any = next((c for c in ENCODERS if c.__name__ in named), None)
    if model_class is None:
        return None
    model = model_class.from_pretrained(source, attn_implementation="eager", dtype=dtype, device_map=device)
    return bridge_encoder(model, AutoTokenizer.from_pretrained(source))
