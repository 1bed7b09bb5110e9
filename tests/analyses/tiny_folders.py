"""Tiny models of kinds that are no decoders, written to a folder with their tokenizers as a user would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from analyses.tasks.ioi_task import NAMES, OBJECTS, PLACES, TEMPLATES
from tests.models import randomize

CLEAN, CORRUPT = "Mary and John went to the store", "John and Mary went to the store"


def _words() -> list[str]:
    """Words of the ioi task, so that it fits these models too."""
    template_words = [word.strip(",") for template in TEMPLATES for word in template.split() if "{" not in word]
    return list(dict.fromkeys([*NAMES, *PLACES, *OBJECTS, *template_words, "store", ","]))


def write_tokenizer(folder: Path, kind: str) -> int:
    """A tokenizer of whole words; of BERT's kind every text is put between [CLS] and [SEP]. Returns the size of its vocabulary."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *_words()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    roles = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        roles |= dict(eos_token="[SEP]", bos_token="[CLS]")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)
    return len(vocabulary)


def _write(folder: Path, model: PreTrainedModel) -> None:
    randomize(model, seed=0)
    model.save_pretrained(folder)


def write_t5(folder: Path) -> None:
    size = write_tokenizer(folder, "t5")
    config = T5Config(
        vocab_size=size, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=3, decoder_start_token_id=0
    )
    _write(folder, T5ForConditionalGeneration(config))


def write_vit(folder: Path) -> None:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    _write(folder, ViTForImageClassification(config))


def write_bert(folder: Path, model_class: type[PreTrainedModel] = BertForMaskedLM) -> None:
    size = write_tokenizer(folder, "bert")
    config = BertConfig(vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, pad_token_id=0)
    _write(folder, model_class(config))


def write_bert_classifier(folder: Path) -> None:
    write_bert(folder, BertForSequenceClassification)


def write_bert_encoder(folder: Path) -> None:
    write_bert(folder, BertModel)


def write_one_head(folder: Path) -> None:
    """A decoder with one head in all, so that there is no correlation over heads."""
    size = write_tokenizer(folder, "gpt2")
    config = GPT2Config(vocab_size=size, n_positions=32, n_embd=16, n_layer=1, n_head=1, bos_token_id=2, eos_token_id=3)
    _write(folder, GPT2LMHeadModel(config))


KINDS: dict[str, Callable[[Path], None]] = {
    "t5": write_t5,
    "vit": write_vit,
    "bert": write_bert,
    "bert_classifier": write_bert_classifier,
    "bert_encoder": write_bert_encoder,
    "one_head": write_one_head,
}


def write_pairs(path: Path) -> None:
    """A file of pairs that every tokenizer here knows."""
    pd.DataFrame([dict(clean=CLEAN, corrupt=CORRUPT, answer="Mary", wrong="John")] * 3).to_csv(path, index=False)
