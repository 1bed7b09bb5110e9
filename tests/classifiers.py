"""Tiny random classifiers of images and of texts, and inputs for them."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.models.encoders import bridge_encoder
from tests.models import VOCAB_SIZE, bridge_from_config, random_tokens, randomize

_SIZES: dict[str, object] = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
_LABELS = {0: "cat", 1: "dog", 2: "horse", 3: "bird", 4: "fish"}
IMAGES, TEXTS = ("vit", "deit"), ("bert_classifier",)
CLASSIFIERS = [*IMAGES, *TEXTS]


def build_classifier(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random model of one of `CLASSIFIERS` with five classes; images are 8 x 12 pixels in patches of 4 x 4."""
    labels: dict[str, object] = dict(id2label=_LABELS, label2id={name: i for i, name in _LABELS.items()})
    if family == "vit":
        settings = _SIZES | labels | dict(image_size=(8, 12), patch_size=4)
        return bridge_from_config(transformers.ViTForImageClassification, transformers.ViTConfig(**settings), dtype, seed)
    if family == "deit":
        settings = _SIZES | labels | dict(image_size=(8, 12), patch_size=4)
        return bridge_from_config(transformers.DeiTForImageClassification, transformers.DeiTConfig(**settings), dtype, seed)
    config = transformers.BertConfig(**_SIZES, **labels, vocab_size=VOCAB_SIZE, max_position_embeddings=32)
    return bridge_encoder(random_bert(transformers.BertForSequenceClassification, config, dtype, seed))


def build_encoder(dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random BERT without a head."""
    config = transformers.BertConfig(**_SIZES, vocab_size=VOCAB_SIZE, max_position_embeddings=32)
    return bridge_encoder(random_bert(transformers.BertModel, config, dtype, seed))


def random_bert(
    model_class: type[transformers.BertPreTrainedModel], config: transformers.BertConfig, dtype: torch.dtype, seed: int
) -> transformers.BertPreTrainedModel:
    """A BERT of Hugging Face's with random weights, in eval mode."""
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    randomize(model, seed)
    return model.to(dtype).eval()


def inputs_for(family: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two inputs of two rows each: images [2, 3, 8, 12], or token ids [2, 6]."""
    if family in TEXTS:
        return random_tokens(seed=0), random_tokens(seed=1)
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 3, 8, 12, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return one, two
