"""Files of dictionaries in each published format, with weights that computers add up exactly, and readings of them in numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

Arrays = dict[str, np.ndarray]
D_IN, D_OUT, N = 4, 3, 6


def dyadic(*shape: int, seed: int = 0) -> np.ndarray:
    """Multiples of 1/4 between -2 and 2, of which sums and products are exact in fp32."""
    return (np.random.default_rng(seed).integers(-8, 9, shape) / 4).astype(np.float32)


def weights(d_out: int = D_IN) -> Arrays:
    """Encoder [d_in, feature], decoder [feature, d_out] and their biases."""
    return {"W_enc": dyadic(D_IN, N, seed=1), "b_enc": dyadic(N, seed=2), "W_dec": dyadic(N, d_out, seed=3), "b_dec": dyadic(d_out, seed=4)}


def thresholds(n: int = N) -> np.ndarray:
    return np.abs(dyadic(n, seed=5))


def inputs() -> np.ndarray:
    return dyadic(5, D_IN, seed=6)


def unit_decoder() -> np.ndarray:
    """Rows of which the norm is a power of two."""
    rows = np.zeros((N, D_IN), np.float32)
    rows[np.arange(N), np.arange(N) % D_IN] = 2.0 ** (np.arange(N) % 3)
    return rows


def jump(x: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0) * (x > threshold)


def top_k(x: np.ndarray, k: int) -> np.ndarray:
    kept = np.zeros_like(x)
    for row, values in enumerate(x):
        for i in sorted(range(len(values)), key=lambda i: -values[i])[:k]:
            kept[row, i] = max(values[i], 0)
    return kept


def saelens(folder: Path, tensors: Arrays, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file({name: np.array(x, order="C") for name, x in tensors.items()}, folder / "sae_weights.safetensors")
    named = {"d_in": D_IN, "d_sae": N, "metadata": {"hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.1.hook_mlp_out"}}
    (folder / "cfg.json").write_text(json.dumps(named | config))
    return folder


def gemma_scope_2(folder: Path, tensors: Arrays, **config: Any) -> Path:
    """google/gemma-scope-2-270m-pt has such folders: resid_post/layer_9_width_16k_l0_medium, transcoder_all/..._affine."""
    folder.mkdir(parents=True)
    lower = {name.replace("W_", "w_"): np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(lower, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "google/gemma-3-270m"} | config))
    return folder


def equal(found: torch.Tensor, expected: np.ndarray) -> None:
    """Bit by bit, and not because everything is zero."""
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.5
    assert np.array_equal(found.numpy(), expected)
