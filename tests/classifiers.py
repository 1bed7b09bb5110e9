"""Tiny random classifiers of images and of texts, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import build
from tests.models import random_tokens

_LABELS = {0: "cat", 1: "dog", 2: "horse", 3: "bird", 4: "fish"}
IMAGES, TEXTS = ("vit", "deit"), ("bert_classifier",)
CLASSIFIERS = [*IMAGES, *TEXTS]


def build_classifier(family: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random model of one of `CLASSIFIERS` with five classes; images are 8 x 12 pixels in patches of 4 x 4."""
    settings: dict[str, object] = dict(id2label=_LABELS, label2id={name: i for i, name in _LABELS.items()}, num_labels=len(_LABELS))
    return build(family, dtype, seed, **settings, **(dict(image_size=(8, 12)) if family in IMAGES else {}))


def build_encoder(dtype: torch.dtype = torch.float64, seed: int = 0) -> TransformerBridge:
    """A tiny random BERT without a head."""
    return build("bert_encoder", dtype, seed)


def inputs_for(family: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two inputs of two rows each: images [2, 3, 8, 12], or token ids [2, 6]."""
    if family in TEXTS:
        return random_tokens(seed=0), random_tokens(seed=1)
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 3, 8, 12, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return one, two
