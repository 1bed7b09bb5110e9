"""Dictionaries with random weights for the models of the tests, in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from lens_relevance.dictionaries import Dictionary, FeatureActivation, Gated, JumpReLU, ReLU, TopK

N = 24
KINDS = ("relu", "jumprelu", "topk", "gated")


def _random(*shape: int, seed: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def activation(kind: str, seed: int = 0) -> FeatureActivation:
    if kind == "gated":
        return Gated(_random(N, seed=seed + 1), _random(N, seed=seed + 2), _random(N, seed=seed + 3))
    return {"relu": ReLU(), "jumprelu": JumpReLU(_random(N, seed=seed).abs()), "topk": TopK(5)}[kind]


def random_dictionary(
    point_in: str,
    point_out: str | tuple[str, ...] = "",
    *,
    d_in: int,
    d_out: int | None = None,
    kind: str = "relu",
    skip: bool = False,
    seed: int = 0,
    **settings: object,
) -> Dictionary:
    """An autoencoder, or with point_out a transcoder."""
    outs = (point_out or point_in,) if isinstance(point_out, str) else point_out
    d_out = d_in if d_out is None else d_out
    return Dictionary(
        encoder=_random(N, d_in, seed=seed),
        encoder_bias=torch.zeros(N, dtype=torch.float64) if kind == "gated" else _random(N, seed=seed + 1),
        decoder=tuple(_random(N, d_out, seed=seed + 2 + i) for i in range(len(outs))),
        decoder_bias=_random(d_out, seed=seed + 50),
        activation=activation(kind, seed),
        point_in=point_in,
        point_out=outs,
        skip=_random(d_out, d_in, seed=seed + 51) if skip else None,
        **settings,  # type: ignore[arg-type]
    )
