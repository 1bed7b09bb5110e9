"""GGUF files: what is loaded from one computes what the model that was written into it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, modeling_gguf_pytorch_utils

from analyses import load_model
from lens_relevance import RelevanceError, logit_diff, propagate
from tests.engine.families import close
from tests.models import randomize

gguf = pytest.importorskip("gguf")

N_LAYERS, N_HEADS, N_KEY_VALUE_HEADS, WIDTH, N_CTX = 2, 4, 2, 32, 64
WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "▁a", "▁b", "▁c", "▁ab"]
NORMAL = {"rope_theta": 500.0, "rope_type": "default"}
LLAMA_3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def _llama(rope: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama with grouped queries and a rotary base of its own."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_KEY_VALUE_HEADS,
        max_position_embeddings=N_CTX,
        rope_parameters=dict(rope),
        rms_norm_eps=1e-3,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    randomize(model, 0)
    return model


def _interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbours and Hugging Face halves, so the rows of queries and keys are in another order there."""
    return weight.reshape(n_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def _write(model: LlamaForCausalLM, path: Path, quantised: bool = False, leave_out: str = "", **more: Any) -> Path:
    """The model as a GGUF file; `quantised` matrices are replaced in the model itself by what their eight bits give back."""
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(N_CTX)
    file.add_embedding_length(WIDTH)
    file.add_block_count(N_LAYERS)
    file.add_feed_forward_length(64)
    file.add_rope_dimension_count(WIDTH // N_HEADS)
    file.add_head_count(N_HEADS)
    file.add_head_count_kv(N_KEY_VALUE_HEADS)
    file.add_layer_norm_rms_eps(1e-3)
    file.add_rope_freq_base(500.0)
    file.add_vocab_size(len(WORDS))
    if "scaling" in more:
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(more["scaling"])
    file.add_tokenizer_model("llama")
    file.add_token_list(WORDS)
    file.add_token_scores([-float(i) for i in range(len(WORDS))])
    file.add_token_types([2, 3, 3, *[1] * (len(WORDS) - 3)])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_add_bos_token(True)
    names, eight = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, N_LAYERS), gguf.GGMLQuantizationType.Q8_0
    for name, parameter in model.state_dict().items():
        weight = parameter.numpy()
        permute = N_HEADS if "q_proj" in name else N_KEY_VALUE_HEADS if "k_proj" in name else 0
        packed = None
        if quantised and weight.ndim == 2:
            packed = gguf.quants.quantize(weight, eight)
            parameter.copy_(torch.tensor(gguf.quants.dequantize(packed, eight)))  # rows are packed one by one, so their order is free
        if name != leave_out:
            stored = weight if packed is None else packed
            stored = _interleaved(stored, permute) if permute else stored
            file.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(stored), raw_dtype=None if packed is None else eight)
    if "factors" in more:
        file.add_tensor("rope_freqs.weight", more["factors"].numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


TOKENS = torch.tensor([[1, 8, 9, 10, 3, 5], [1, 4, 4, 11, 6, 7]])


@pytest.mark.parametrize("quantised", [False, True])
@torch.no_grad()
def test_the_logits_are_those_of_the_model_in_the_file(quantised: bool, tmp_path: Path) -> None:
    original = _llama(NORMAL)
    before = original(TOKENS).logits
    path = _write(original, tmp_path / "model.gguf", quantised)
    model = load_model(str(path))
    logits = original(TOKENS).logits
    assert (logits - before).abs().max() > 1e-3 if quantised else torch.equal(logits, before)
    close(model(TOKENS), logits, 1e-6)
    assert not model.training and model.cfg.model_name == "model.gguf"
    assert model.to_str_tokens("ab a b") == ["<s>", "ab", "a", "b"]


def test_relevance_is_that_of_the_same_weights_in_a_folder(tmp_path: Path) -> None:
    original = _llama(NORMAL)
    model = load_model(str(_write(original, tmp_path / "model.gguf")))
    original.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    target = logit_diff(3, 4)
    found, expected = (propagate(one, TOKENS, target, rules="attnlrp") for one in (model, load_model(str(tmp_path))))
    assert found.tokens().abs().max() > 1e-2
    close(found.tokens(), expected.tokens(), 1e-6)


@torch.no_grad()
def test_the_frequencies_of_llama_3_are_divided_by_the_factors_of_the_file(tmp_path: Path) -> None:
    """transformers' reader leaves this tensor out without a word."""
    original, plain = _llama(LLAMA_3), _llama(NORMAL)
    factors = plain.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    model = load_model(str(_write(original, tmp_path / "model.gguf", factors=factors)))
    close(model(TOKENS), original(TOKENS).logits, 1e-5)
    assert (original(TOKENS).logits - plain(TOKENS).logits).abs().max() > 1e-2


def test_what_the_reader_would_leave_out_is_refused(tmp_path: Path) -> None:
    model = _llama(NORMAL)
    with pytest.raises(RelevanceError, match=r"rotary embedding \(linear\)"):
        load_model(str(_write(model, tmp_path / "scaled.gguf", scaling=8.0)))
    with pytest.raises(RelevanceError, match=r"part.gguf: its files lack 1 of the weights .*\(model.layers.1.mlp.up_proj.weight for one"):
        load_model(str(_write(model, tmp_path / "part.gguf", leave_out="model.layers.1.mlp.up_proj.weight")))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    for name, message in (("none.gguf", "there is no file"), ("text.gguf", "not a GGUF file")):
        with pytest.raises(RelevanceError, match=message):
            load_model(str(tmp_path / name))
    whole = _write(_llama(NORMAL), tmp_path / "whole.gguf")
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-3000])
    with pytest.raises(RelevanceError, match="cut.gguf"):
        load_model(str(tmp_path / "cut.gguf"))
    with pytest.raises(RelevanceError, match="name the GGUF file itself"):
        load_model(str(tmp_path))
    monkeypatch.setattr("analyses.models.gguf.find_spec", lambda _: None)
    with pytest.raises(RelevanceError, match="pip install gguf"):
        load_model(str(whole))


def test_loading_leaves_the_reader_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm
    load_model(str(_write(_llama(NORMAL), tmp_path / "model.gguf")))
    assert (gguf.GGUFReader, modeling_gguf_pytorch_utils.tqdm) == before
    assert "%|" not in capfd.readouterr().err


def test_dtype_and_device(tmp_path: Path) -> None:
    path = str(_write(_llama(NORMAL), tmp_path / "model.gguf"))
    half = load_model(path, dtype="bfloat16")
    assert {p.dtype for p in half.original_model.parameters()} == {torch.bfloat16}
    close(load_model(path, device="auto")(TOKENS), load_model(path)(TOKENS), 1e-7)
