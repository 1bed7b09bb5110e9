"""`lens-relevance explain --method`: one prompt by a method of token relevance, also on an encoder-decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from analyses.cli import app
from analyses.models.loading import load_model
from analyses.report.token_explanation import explain_tokens
from lens_relevance import logit, token_relevance
from tests import models
from tests.fixtures import STORIES

WORDS = ["<pad>", "</s>", "<unk>", "the", "cat", "sat", "on", "mat"]


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    """A folder with a tiny random T5 and a tokenizer of whole words."""
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    models.randomize(model, 0)
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    roles = dict(eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(tmp_path)
    return tmp_path


def explain(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["explain", "--method", *arguments], env={"COLUMNS": "160"})
    assert result.exit_code == (2 if "Error" in result.output else 0), result.output
    return " ".join(result.output.split())


def test_one_prompt_and_one_task() -> None:
    shown = explain("weighted_accumulation", "--prompt", "When Mary and John went to the store, John gave a drink to")
    assert "weighted_accumulation (gradient)" in shown and "Mary" in shown and "│ explained │" in shown and "blocks.1.attn" in shown
    assert "Heads" not in explain("attention_flow", "--rules", "attnlrp", "--task", "induction")


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the trained model ../shared/models/stories260k beside the checkout")
def test_stories() -> None:
    assert "blocks.4.attn" in explain("weighted_accumulation", "--model", str(STORIES))


def test_an_encoder_decoder(t5: Path) -> None:
    shown = explain("weighted_accumulation", "--model", str(t5), "--prompt", "the cat sat on the", "--answer", "mat")
    assert "encoder ┏" in shown and "decoder ┏" in shown and "decoder_blocks.1.cross_attn" in shown
    model = load_model(str(t5))
    found = token_relevance(model, "the cat sat on the", logit("mat"))
    assert f"{found.scores['encoder'][0, 1].item():.3f}" in shown
    assert "give a --prompt" in explain("chefer", "--model", str(t5))


def test_figures_are_those_of_token_relevance(gpt2, tokens: torch.Tensor) -> None:
    found = token_relevance(gpt2, tokens[:1], logit(7), method="chefer")
    table = explain_tokens(gpt2, tokens[:1], logit(7), method="chefer", rules="gradient").renderables[1].renderables[1]
    assert [float(str(cell)) for cell in table.columns[2].cells] == pytest.approx(found.scores[0].tolist(), abs=5e-4)


def test_bad_input() -> None:
    assert "unknown method 'lime'" in explain("lime")
    assert "leave out --against" in explain("chefer", "--prompt", "Mary", "--against", "John")
    assert "--wrong goes with --answer" in explain("chefer", "--prompt", "Mary", "--wrong", "John")
