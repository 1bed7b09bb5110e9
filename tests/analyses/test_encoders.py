"""BERT with a classifier, or without a head, behind a bridge: from the model, or from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel

from analyses import bridge_encoder, load_model
from analyses.benchmarks.tiny_models import random_model
from lens_relevance import RelevanceError, logit, propagate, random_tokens
from tests.classifiers import build_classifier
from tests.engine.families import close
from tests.models import build_gpt2

_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film")


def _folder(path: Path, model_class: type[transformers.BertPreTrainedModel]) -> transformers.BertPreTrainedModel:
    """A tiny BERT, saved with a tokenizer that frames texts by [CLS] and [SEP]."""
    words = {word: i for i, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(path)
    config = transformers.BertConfig(
        vocab_size=len(_WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        id2label={0: "no", 1: "yes"},
    )
    model = random_model(model_class, config, torch.float32)
    model.save_pretrained(path)
    return model


def test_a_folder_with_a_text_classifier_is_loaded_with_its_head(tmp_path: Path) -> None:
    """TransformerLens would load it as a masked language model whose head is random."""
    original = _folder(tmp_path, transformers.BertForSequenceClassification)
    model = load_model(str(tmp_path))
    assert model.to_str_tokens("a good film") == ["[CLS]", "a", "good", "film", "[SEP]"]
    tokens = model.to_tokens("a good film")
    cache = propagate(model, "a good film", logit("yes"))
    close(cache.value, original(tokens).logits[:, 1], 1e-5)
    assert cache.tokens().shape == (1, 5)
    held = propagate(model, "a good film", logit("yes"), reference=random_tokens(3))
    assert held.tokens()[0, [0, 4]].tolist() == [0, 0], "[CLS] and [SEP] frame the reference too"
    assert float(held.tokens()[0, 1:4].abs().min()) > 0


def test_a_folder_with_an_encoder_alone_gives_its_last_hidden_state(tmp_path: Path) -> None:
    original = _folder(tmp_path, transformers.BertModel)
    model = load_model(str(tmp_path))
    tokens = model.to_tokens("a bad film")
    close(model(tokens), original(tokens).last_hidden_state, 1e-5)


def test_a_folder_with_an_image_classifier_is_loaded(tmp_path: Path) -> None:
    model = build_classifier("vit", torch.float32)
    config = model.original_model.config
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 8, "width": 12}).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert propagate(loaded, torch.rand(3, 8, 12), logit("cat")).patches().shape == (1, 2, 3)


def test_another_model_is_refused_by_name() -> None:
    with pytest.raises(RelevanceError, match="BertForSequenceClassification.*not GPT2LMHeadModel"):
        bridge_encoder(build_gpt2().original_model)
