"""Dictionaries from files: each format encodes and decodes bit by bit as numpy does, and what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from lens_relevance import RelevanceError
from lens_relevance.dictionaries import Dictionary, Gated, JumpReLU, ReLU, TopK, read_dictionaries, read_dictionary
from tests.dictionaries.files import (
    D_IN,
    D_OUT,
    N,
    dyadic,
    equal,
    gemma_scope_2,
    inputs,
    jump,
    saelens,
    thresholds,
    top_k,
    unit_decoder,
    weights,
)
from tests.dictionaries.random_dictionaries import random_dictionary

X = inputs()


def compare(dictionary: Dictionary, values: np.ndarray, output: np.ndarray) -> None:
    x = torch.from_numpy(X)
    equal(dictionary.encode(x), values)
    equal(dictionary.decode(dictionary.encode(x), x), output)


@pytest.mark.parametrize("applies", [True, False])
def test_saelens_standard(tmp_path: Path, applies: bool) -> None:
    w = weights()
    read = read_dictionary(saelens(tmp_path / "sae", w, architecture="standard", apply_b_dec_to_input=applies))
    values = np.maximum((X - w["b_dec"] * applies) @ w["W_enc"] + w["b_enc"], 0)
    compare(read, values, values @ w["W_dec"] + w["b_dec"])
    assert isinstance(read.activation, ReLU)
    assert read.point_out == (read.point_in,) == ("blocks.1.hook_resid_pre",)


def test_saelens_jumprelu(tmp_path: Path) -> None:
    w = weights() | {"threshold": thresholds()}
    read = read_dictionary(saelens(tmp_path / "sae", w, architecture="jumprelu", apply_b_dec_to_input=False))
    values = jump(X @ w["W_enc"] + w["b_enc"], w["threshold"])
    compare(read, values, values @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("rescaled", [False, True])
def test_saelens_topk(tmp_path: Path, rescaled: bool) -> None:
    w = weights() | {"W_dec": unit_decoder()}
    config = dict(architecture="topk", k=2, rescale_acts_by_decoder_norm=rescaled, apply_b_dec_to_input=False)
    read = read_dictionary(saelens(tmp_path / "sae", w, **config))
    norm = np.linalg.norm(w["W_dec"], axis=1) if rescaled else np.ones(N, np.float32)
    values = top_k((X @ w["W_enc"] + w["b_enc"]) * norm, 2)
    compare(read, values, (values / norm) @ w["W_dec"] + w["b_dec"])
    assert read.activation == TopK(2)


def test_saelens_topk_as_older_versions_write_it(tmp_path: Path) -> None:
    w = weights()
    read = read_dictionary(
        saelens(tmp_path / "sae", w, activation_fn_str="topk", activation_fn_kwargs={"k": 3}, apply_b_dec_to_input=False)
    )
    assert read.activation == TopK(3)


def test_saelens_batchtopk_is_a_jump_at_the_learned_threshold(tmp_path: Path) -> None:
    w = weights() | {"topk_threshold": np.array(0.75, np.float32)}
    read = read_dictionary(saelens(tmp_path / "sae", w, architecture="batchtopk", apply_b_dec_to_input=False))
    values = jump(X @ w["W_enc"] + w["b_enc"], np.full(N, 0.75, np.float32))
    compare(read, values, values @ w["W_dec"] + w["b_dec"])


def test_saelens_gated(tmp_path: Path) -> None:
    w = weights()
    del w["b_enc"]
    w |= {"b_gate": dyadic(N, seed=7), "b_mag": dyadic(N, seed=8), "r_mag": np.zeros(N, np.float32)}  # exp(0) is exact
    read = read_dictionary(saelens(tmp_path / "sae", w, architecture="gated"))
    before = (X - w["b_dec"]) @ w["W_enc"]
    values = (before + w["b_gate"] > 0) * np.maximum(before * np.exp(w["r_mag"]) + w["b_mag"], 0)
    compare(read, values, values @ w["W_dec"] + w["b_dec"])
    assert isinstance(read.activation, Gated)


def test_the_magnitude_of_a_gated_feature_is_scaled() -> None:
    gated = Gated(torch.zeros(1), torch.zeros(1), torch.tensor([0.5]))
    assert torch.equal(gated(torch.tensor([[2.0], [-1.0]])), torch.tensor([[2 * np.exp(0.5)], [0]], dtype=torch.float32))


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_saelens_transcoders(tmp_path: Path, architecture: str) -> None:
    w = weights(D_OUT)
    if "jumprelu" in architecture:
        w["threshold"] = thresholds()
    if "skip" in architecture:
        w["W_skip"] = dyadic(D_OUT, D_IN, seed=9)
    read = read_dictionary(saelens(tmp_path / "sae", w, architecture=architecture, apply_b_dec_to_input=False))
    before = X @ w["W_enc"] + w["b_enc"]
    values = jump(before, w["threshold"]) if "jumprelu" in architecture else np.maximum(before, 0)
    output = values @ w["W_dec"] + w["b_dec"]
    compare(read, values, output + X @ w["W_skip"].T if "skip" in architecture else output)
    assert read.point_out == ("blocks.1.hook_mlp_out",)


def test_saelens_scaling_factors_scale_what_a_feature_writes(tmp_path: Path) -> None:
    w = weights() | {"scaling_factor": 2.0 ** np.arange(N, dtype=np.float32)}
    used = read_dictionary(saelens(tmp_path / "used", w, finetuning_scaling_factor=True, apply_b_dec_to_input=False))
    values = np.maximum(X @ w["W_enc"] + w["b_enc"], 0)
    compare(used, values, (values * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"])
    unused = read_dictionary(saelens(tmp_path / "unused", w, finetuning_scaling_factor=False, apply_b_dec_to_input=False))
    compare(unused, values, values @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
def test_saelens_normalization(tmp_path: Path, normalization: str) -> None:
    """In fp64, as roots are not exact."""
    w = weights()
    read = read_dictionary(saelens(tmp_path / "sae", w, normalize_activations=normalization, apply_b_dec_to_input=False))
    x = X.astype(np.float64) + 0.1
    if normalization == "constant_norm_rescale":
        mean, into = np.zeros((5, 1)), np.linalg.norm(x, axis=1, keepdims=True) / D_IN**0.5
        out = into
    else:
        mean = x.mean(1, keepdims=True)
        out = (x - mean).std(1, ddof=1, keepdims=True)
        into = out + 1e-5
    values = np.maximum((x - mean) / into @ w["W_enc"] + w["b_enc"], 0)
    output = (values @ w["W_dec"] + w["b_dec"]) * out + mean
    given = torch.from_numpy(x)
    read = read.to(given)
    assert np.abs(read.encode(given).numpy() - values).max() < 1e-13 < np.abs(values).max()
    assert np.abs(read.decode(read.encode(given), given).numpy() - output).max() < 1e-13


def test_gemma_scope_1(tmp_path: Path) -> None:
    """An npz with capital letters, which names no HookPoint."""
    w = weights() | {"threshold": thresholds()}
    np.savez(tmp_path / "params.npz", **w)
    for path in (tmp_path, tmp_path / "params.npz"):
        read = read_dictionary(path, point_in="blocks.20.hook_resid_post")
        values = jump(X @ w["W_enc"] + w["b_enc"], w["threshold"])
        compare(read, values, values @ w["W_dec"] + w["b_dec"])
        assert read.is_autoencoder
    transcoder = read_dictionary(tmp_path, point_in="blocks.20.ln2.hook_out", point_out="blocks.20.hook_mlp_out")
    assert transcoder.point_out == ("blocks.20.hook_mlp_out",)
    with pytest.raises(RelevanceError, match="point_in="):
        read_dictionary(tmp_path)


@pytest.mark.parametrize(
    ("module", "point"),
    [
        ("model.layers.9.output", "blocks.9.hook_resid_post"),
        ("model.layers.9.self_attn.o_proj.input", "blocks.9.attn.hook_z"),
        ("model.layers.9.post_feedforward_layernorm.output", "blocks.9.hook_mlp_out"),
        ("model.language_model.layers.9.output", "blocks.9.hook_resid_post"),
    ],
)
def test_gemma_scope_2_autoencoders(tmp_path: Path, module: str, point: str) -> None:
    w = weights() | {"threshold": thresholds()}
    config = dict(hf_hook_point_in=module, hf_hook_point_out=module, affine_connection=False, type="sae")
    folder = gemma_scope_2(tmp_path / "resid_post" / "layer_9_width_16k_l0_medium", w, **config)
    read = read_dictionary(folder)
    values = jump(X @ w["W_enc"] + w["b_enc"], w["threshold"])
    compare(read, values, values @ w["W_dec"] + w["b_dec"])
    assert (read.point_in, read.point_out) == (point, (point,))


def test_gemma_scope_2_transcoder_with_affine_skip(tmp_path: Path) -> None:
    """Theirs multiplies the skip connection from the right, x @ W: an asymmetric one tells the two apart."""
    w = weights() | {"threshold": thresholds(), "affine_skip_connection": dyadic(D_IN, D_IN, seed=9)}
    assert not np.array_equal(w["affine_skip_connection"], w["affine_skip_connection"].T)
    config = dict(
        hf_hook_point_in="model.layers.3.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.3.post_feedforward_layernorm.output",
    )
    read = read_dictionary(gemma_scope_2(tmp_path / "transcoder_all" / "layer_3_width_16k_l0_small_affine", w, **config))
    values = jump(X @ w["W_enc"] + w["b_enc"], w["threshold"])
    compare(read, values, values @ w["W_dec"] + w["b_dec"] + X @ w["affine_skip_connection"])
    assert (read.point_in, read.point_out) == ("blocks.3.ln2.hook_out", ("blocks.3.hook_mlp_out",))


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "skip"])
def test_circuit_tracer_by_layer(tmp_path: Path, kind: str) -> None:
    tensors = []
    for layer in range(2):
        w = weights() | {"W_enc": dyadic(N, D_IN, seed=layer)}  # [feature, d_model]
        if kind == "jumprelu":
            w["activation_function.threshold"] = thresholds()
        if kind == "topk":
            w["k"] = np.array(2)
        if kind == "skip":
            w["W_skip"] = dyadic(D_IN, D_IN, seed=9)
        save_file(w, tmp_path / f"layer_{layer}.safetensors")
        tensors.append(w)
    (tmp_path / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    )
    read = read_dictionaries(tmp_path)
    for layer, w in enumerate(tensors):
        before = X @ w["W_enc"].T + w["b_enc"]
        values = {"jumprelu": lambda x: x * (x > thresholds()), "topk": lambda x: top_k(x, 2)}.get(kind, lambda x: np.maximum(x, 0))(before)
        output = values @ w["W_dec"] + w["b_dec"]
        compare(read[layer], values, output + X @ w["W_skip"].T if kind == "skip" else output)
        assert (read[layer].point_in, read[layer].point_out) == (f"blocks.{layer}.mlp.hook_in", (f"blocks.{layer}.hook_mlp_out",))
    assert [d.point_in for d in read_dictionaries(tmp_path, layers=[1])] == ["blocks.1.mlp.hook_in"]
    with pytest.raises(RelevanceError, match="no transcoder of layer"):
        read_dictionaries(tmp_path, layers=[2])


def test_circuit_tracer_across_layers(tmp_path: Path) -> None:
    n_layers = 3
    for i in range(n_layers):
        first = {f"W_enc_{i}": dyadic(N, D_IN, seed=i), f"b_enc_{i}": dyadic(N, seed=10 + i), f"b_dec_{i}": dyadic(D_IN, seed=20 + i)}
        save_file(first | {f"threshold_{i}": thresholds()}, tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": dyadic(N, n_layers - i, D_IN, seed=30 + i)}, tmp_path / f"W_dec_{i}.safetensors")
    read = read_dictionaries(tmp_path)
    for i, dictionary in enumerate(read):
        before = X @ dyadic(N, D_IN, seed=i).T + dyadic(N, seed=10 + i)
        values = before * (before > thresholds())
        decoder = dyadic(N, n_layers - i, D_IN, seed=30 + i)
        compare(dictionary, values, values @ decoder[:, 0] + dyadic(D_IN, seed=20 + i))
        for later in range(1, n_layers - i):
            equal(dictionary.decode(torch.from_numpy(values), index=later), values @ decoder[:, later])
        assert dictionary.point_out == tuple(f"blocks.{later}.hook_mlp_out" for later in range(i, n_layers))
    assert len({d.set_name for d in read}) == 1
    with pytest.raises(RelevanceError, match="leave out layers="):
        read_dictionaries(tmp_path, layers=[0])


def bad_saelens(tmp_path: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    return saelens(tmp_path / "bad", {**weights(), **(tensors or {})}, **config)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"architecture": "matching_pursuit"}, "architecture 'matching_pursuit' is not known; there are standard"),
        ({"W_other": dyadic(2)}, {}, "not known: W_other"),
        ({}, {"architecture": "jumprelu"}, "no 'threshold'"),
        ({"threshold": thresholds(N - 1)}, {"architecture": "jumprelu"}, "threshold is for 5 features, and the encoder has 6"),
        ({"b_enc": dyadic(N - 1)}, {}, r"encoder_bias is \[5\]"),
        ({"W_dec": dyadic(N, D_IN + 1)}, {}, r"decoder\[0\] is \[6, 5\]"),
        ({"W_enc": dyadic(N)}, {}, r"'W_enc' is \[6\], where 2"),
        ({}, {"normalize_activations": "expected_average_only_in"}, "fold it into the weights"),
        ({}, {"normalize_activations": "other"}, "'other' is not known"),
        ({}, {"activation_fn": "tanh-relu"}, "tanh-relu"),
        ({}, {"architecture": "topk"}, r"\(k\)"),
        ({}, {"hook_head_index": 3}, "one head"),
        ({}, {"finetuning_scaling_factor": True}, "no scaling_factor"),
        ({}, {"architecture": "transcoder", "normalize_activations": "layer_norm"}, "is for autoencoders"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        read_dictionary(bad_saelens(tmp_path, tensors, **config))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RelevanceError, match="does not exist"):
        read_dictionary(tmp_path / "absent")
    with pytest.raises(RelevanceError, match="no dictionary of a known format"):
        read_dictionary(tmp_path)
    with pytest.raises(RelevanceError, match="no dictionary of a known format"):
        read_dictionaries(tmp_path)
    with pytest.raises(RelevanceError, match="of which layers could be chosen"):
        read_dictionaries(tmp_path, layers=[0])
    (tmp_path / "ae.pt").write_bytes(b"")
    with pytest.raises(RelevanceError, match="can run code"):
        read_dictionary(tmp_path / "ae.pt")
    (tmp_path / "params.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(RelevanceError, match="cannot be read as safetensors"):
        read_dictionary(tmp_path, point_in="blocks.0.hook_resid_post")
    (tmp_path / "cfg.json").write_text("[1]")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(RelevanceError, match="not an object"):
        read_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text('{"d_in": 1, "d_in": 2}')
    with pytest.raises(RelevanceError, match="occurs twice"):
        read_dictionary(tmp_path)


def test_npz_with_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    with pytest.raises(RelevanceError, match="cannot be read as npz"):
        read_dictionary(tmp_path, point_in="blocks.0.hook_resid_post")


def test_unknown_modules_of_gemma_scope_2(tmp_path: Path) -> None:
    w = weights() | {"threshold": thresholds()}
    folder = gemma_scope_2(tmp_path / "a", w, hf_hook_point_in="model.layers.3.mlp.act.output")
    with pytest.raises(RelevanceError, match=r"pass point_in="):
        read_dictionary(folder)
    assert read_dictionary(folder, point_in="blocks.3.mlp.hook_post").is_autoencoder
    (folder / "config.json").write_text(json.dumps({"architecture": "relu", "hf_hook_point_in": "model.layers.3.output"}))
    with pytest.raises(RelevanceError, match="only jump_relu"):
        read_dictionary(folder)


def test_a_dictionary_of_ones_own() -> None:
    w = {name: torch.from_numpy(x) for name, x in weights().items()}
    parts = dict(encoder=w["W_enc"].T, encoder_bias=w["b_enc"], decoder=w["W_dec"], decoder_bias=w["b_dec"])
    own = Dictionary(**parts, activation=JumpReLU(torch.zeros(N)), point_in="a", point_out="a")  # type: ignore[arg-type]
    assert own.is_autoencoder
    assert own.n_features == N
    with pytest.raises(RelevanceError, match=r"1 decoder\(s\) for 2"):
        Dictionary(**parts, activation=ReLU(), point_in="a", point_out=("a", "b"))  # type: ignore[arg-type]
    with pytest.raises(RelevanceError, match="at least one"):
        TopK(0)


def test_an_autoencoder_writes_to_where_it_reads_and_nowhere_else() -> None:
    here, there = "blocks.0.hook_out", "blocks.1.hook_out"
    assert random_dictionary(here, d_in=8, normalization="layer_norm").is_autoencoder
    for outs in ((here, there), (there,)):
        assert not random_dictionary(here, outs, d_in=8).is_autoencoder
        with pytest.raises(RelevanceError, match="is for autoencoders"):
            random_dictionary(here, outs, d_in=8, normalization="layer_norm")
