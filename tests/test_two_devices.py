"""A model spread over two devices gives what it gives on one: relevance, its account, patching, ranking, comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, Node
from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.methods import eap_ig
from analyses.patching import ablation, activation_patching, path_patching
from lens_relevance import propagate, token_relevance
from tests.analyses.test_ranking import random_pairs
from tests.two_devices import CPU, FIRST, SECOND, build, on_two_devices, place

PAIRS = random_pairs()
HEADS = tuple(name for name in COMPONENTS if name != "neurons")


def test_the_stand_in_refuses_what_pytorch_refuses() -> None:
    with on_two_devices():
        one, two = torch.ones(3, device=FIRST), torch.ones(3, device=SECOND)
        for mixed in (lambda: one + two, lambda: torch.stack([one, two]), lambda: one[two.long()], lambda: one @ torch.ones(3)):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            two.numpy()
        assert place(one + two.to(FIRST)) == FIRST and place(two[torch.tensor([0])] * torch.tensor(2.0)) == SECOND
        assert str(two.device) == SECOND and place(two.cpu()) == CPU
    assert str(two.device) == CPU


def relevance(model: TransformerBridge) -> Tensor:
    cache = propagate(model, PAIRS.clean, PAIRS.target, rules="deeplift", reference=PAIRS.corrupt, audit=True)
    account = torch.tensor(cache.conservation().drop(columns=["example", "layer"]).to_numpy(float)).float()
    parts = (cache.heads(), cache.residual(), cache.tokens(), cache.neurons(1), account)
    return torch.cat([part.cpu().flatten() for part in parts])


def single(model: TransformerBridge) -> Tensor:
    return propagate(model, PAIRS.clean, PAIRS.target, rules="attnlrp").heads().cpu()


def from_attention(model: TransformerBridge) -> Tensor:
    found = [
        token_relevance(model, PAIRS.clean, PAIRS.target, method=method) for method in ("weighted_accumulation", "rollout", "chefer_2021a")
    ]
    return torch.cat([part.cpu().flatten() for one in found for part in (one.scores, one.heads)])


def patching(model: TransformerBridge) -> Tensor:
    whole, by_position = (
        activation_patching(model, PAIRS, HEADS, direction="mean"),
        activation_patching(model, PAIRS, ("z", "k"), by_position=True),
    )
    neurons = activation_patching(model, PAIRS, [Node("neuron", layer, neuron=i) for layer in (0, 1) for i in (1, 3, 5)])
    assert whole.shortcut == by_position.shortcut == "position"
    return torch.cat([result.effect for result in (whole, by_position, neurons)])


def paths(model: TransformerBridge) -> Tensor:
    return path_patching(model, PAIRS, "z", receivers=["q", "k", "v", "z", "logits"]).effect


def ablations(model: TransformerBridge) -> Tensor:
    return torch.cat([ablation(model, PAIRS, value=value).effect for value in ("zero", "mean")])  # type: ignore[arg-type]


def rankings(model: TransformerBridge) -> Tensor:
    heads, neurons = rank_heads(model, PAIRS, ablate="mean"), rank_neurons(model, PAIRS, ablate=True)
    keys = rank_heads(model, PAIRS, "atp_star", component="k")
    checks = torch.tensor([heads.attrs["ablation"].top, neurons.attrs["ablation"].random])
    return torch.cat([checks, *(torch.tensor(frame["score"].to_numpy()).float() for frame in (heads, neurons, keys))])


def comparison(model: TransformerBridge) -> Tensor:
    methods = ["deeplift", "relp", "atp_star", eap_ig(2), "direct_logit_attribution"]
    table: pd.DataFrame = compare_with_patching(model, PAIRS, methods, resamples=0)
    return torch.tensor(table[["pearson", "magnitude_error"]].to_numpy(float))


@pytest.mark.parametrize("analysis", [relevance, single, from_attention, patching, paths, ablations, rankings, comparison])
def test_two_devices_give_what_one_gives(analysis: Callable[[Any], Tensor]) -> None:
    model = build(spread=True)
    with on_two_devices():
        spread = analysis(model)
    plain = analysis(build(spread=False))
    assert spread.abs().max() > 1e-3
    torch.testing.assert_close(spread, plain, rtol=1e-5, atol=1e-6)
