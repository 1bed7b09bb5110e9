"""Ablation of a ranking's top: what it costs, against activation patching and ablation of single components."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.patching import Node, ablation, activation_patching
from analyses.tasks import PromptPairs
from tests import models
from tests.analyses.test_ranking import random_pairs


def padded_pairs() -> PromptPairs:
    """Pairs of two lengths, so that the mean at late positions is over fewer prompts."""
    pairs = random_pairs(6)
    mask = torch.ones_like(pairs.clean)
    mask[:2, -2:] = 0
    return PromptPairs(pairs.clean, pairs.corrupt, pairs.target, mask, mask)


@pytest.mark.parametrize("pairs", [random_pairs(6), padded_pairs()], ids=["one length", "padded"])
def test_one_head_at_its_mean_costs_what_ablation_says(gpt2: TransformerBridge, pairs: PromptPairs, tmp_path: Path) -> None:
    """In batches, and read from a checkpoint the second time."""
    effects = ablation(gpt2, pairs, "z", value="mean").to_dataframe().set_index(["layer", "head"])["effect"]
    for _ in range(2):
        ranking = rank_heads(gpt2, pairs, top_k=1, ablate="mean", batch_size=4, checkpoint=tmp_path)
        check = ranking.attrs["ablation"]
        assert check.replacement == "mean" and "mean over the clean prompts" in str(check)
        assert check.top == pytest.approx(effects.loc[ranking["layer"][0], ranking["head"][0]], rel=1e-4)
        # Random sets are of one head too, and not all the same
        assert effects.min() < check.random < effects.max() and abs(check.random - check.top) > 1e-3 < check.random_std
    to_corrupt = rank_heads(gpt2, pairs, top_k=1, ablate=True).attrs["ablation"]
    assert to_corrupt.replacement == "corrupt" and abs(to_corrupt.top - check.top) > 1e-3
    assert to_corrupt.gap == pytest.approx(check.gap, rel=1e-5)


def test_one_neuron_at_its_mean_costs_what_ablation_says(gpt2: TransformerBridge) -> None:
    pairs = random_pairs(6)
    ranking = rank_neurons(gpt2, pairs, top_k=1, ablate="mean")
    node = Node("neuron", int(ranking["layer"][0]), neuron=int(ranking["neuron"][0]))
    expected = ablation(gpt2, pairs, node, value="mean").effect.mean().item()
    assert abs(expected) > 1e-4 and ranking.attrs["ablation"].top == pytest.approx(expected, rel=1e-3)


def test_keys_of_a_group_are_ablated_together() -> None:
    """Under grouped-query attention there is a row per key-value head."""
    model, pairs = models.build_llama(), random_pairs(4)
    ranking = rank_heads(model, pairs, top_k=1, ablate=True, component="k")
    assert len(ranking) == 2 * 2
    effects = activation_patching(model, pairs, "k", direction="noising").to_dataframe().set_index(["layer", "head"])["effect"]
    assert ranking.attrs["ablation"].top == pytest.approx(effects.loc[ranking["layer"][0], ranking["head"][0]], rel=1e-4)
