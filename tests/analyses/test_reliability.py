"""Intervals and flags against sums by hand, and the certification of a top k against exhaustive patching."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.certification import AT_ONCE, Certificate, settle
from analyses.evaluation.ranking import rank_heads, rank_neurons, rank_positions
from analyses.evaluation.reliability import FLOOR, WIDTH, coverage, reliability
from analyses.methods import estimator
from analyses.patching import Node, activation_patching
from analyses.tasks import PromptPairs, ioi
from lens_relevance import RelevanceError
from lens_relevance.errors import OutOfRangeError
from tests.analyses.test_ranking import random_pairs


def test_an_interval_reaches_as_far_as_the_furthest_estimate() -> None:
    score, estimates = np.array([10.0, 1.0, -2.0, 0.0]), np.array([[14.0, 2.0, -4.0, 0.0], [9.0, 1.0, -2.0, 0.0]])
    found = reliability("q", score, estimates)
    half = [0.75 * 4 + 0.1, 0.75 * 1 + 0.1, 0.75 * 2 + 0.1, 0.0]  # the floor is 1 % of 10; the last one is the same in both runs
    np.testing.assert_allclose(found.low, score - half)
    np.testing.assert_allclose(found.high, score + half)
    assert found.reliable.tolist() == [False, True, False, True]  # 1.6 is more than a tenth of 10
    assert WIDTH["q"] == 0.75 and FLOOR == 0.01


def test_coverage_counts_what_is_inside_and_what_is_wrong() -> None:
    score, estimates = np.array([10.0, 5.0, 1.0, 0.5]), np.array([[10.0, 8.0, 1.0, 0.5]])
    found = reliability("heads", score, estimates)
    patched = np.array([10.05, 7.5, 4.0, np.nan])
    result = coverage(found, score, patched)
    assert result.n == 3 and result.inside == pytest.approx(2 / 3) and result.flagged == pytest.approx(1 / 3)
    assert result.wrong == pytest.approx(2 / 3) and result.recall == pytest.approx(0.5)  # the third is wrong, and looked safe
    assert "67% of 3 intervals" in str(result) and "50% of them are flagged" in str(result)
    assert np.isnan(coverage(found, score, score).recall)


def patcher(effects: np.ndarray, asked: list[int]):  # type: ignore[no-untyped-def]
    def patch(chosen):  # type: ignore[no-untyped-def]
        asked.extend(chosen)
        return np.stack([effects[i] + np.array([-1.0, 1.0]) for i in chosen])

    return patch


@pytest.mark.parametrize("seed", range(20))
def test_the_top_is_that_of_patching_everything_where_intervals_hold(seed: int) -> None:
    rng = np.random.default_rng(seed)
    effects = rng.standard_normal(60) * rng.exponential(size=60)
    half = rng.exponential(0.3, size=60)
    score = effects + rng.uniform(-1, 1, size=60) * half
    asked: list[int] = []
    found, rounds = settle(score - half, score + half, score, 7, patcher(effects, asked))
    settled = score.copy()
    for i, effect in found.items():
        settled[i] = effect.mean()
    assert set(np.argsort(-np.abs(settled))[:7]) == set(np.argsort(-np.abs(effects))[:7])
    assert len(asked) == len(set(asked)) == len(found) < 60 and len(asked) <= 2 * AT_ONCE * rounds


def test_nothing_is_patched_where_nothing_is_open() -> None:
    asked: list[int] = []
    score = np.array([5.0, -4.0, 1.0, 0.0])
    found, rounds = settle(score - 0.5, score + 0.5, score, 2, patcher(score, asked))
    assert not found and not rounds and not asked
    assert settle(score - 9, score + 9, score, 4, patcher(score, asked))[1] == 0  # everything is in the top 4
    settle(score - 9, score + 9, score, 2, patcher(score, asked))
    assert sorted(asked) == [0, 1, 2, 3]


def test_forwards_are_counted_with_the_runs_that_are_compared_with() -> None:
    certificate = Certificate(10, "mean", patched=8, n=72, rounds=2)
    assert (certificate.forwards, certificate.sweep) == (20, 146)
    assert (Certificate(10, "noising", 8, 72, 2).forwards, Certificate(10, "noising", 8, 72, 2).sweep) == (12, 74)
    assert "20 of the 146 forwards" in str(certificate) and "if the intervals of the 64 others hold" in str(certificate)


def test_columns_are_those_of_the_bracket(gpt2: TransformerBridge) -> None:
    """low and high from deeplift and from gradients in both runs, each by its own method."""
    pairs = random_pairs()
    ranking = rank_heads(gpt2, pairs, batch_size=2)
    methods = [("deeplift", "corrupt"), ("gradient", "corrupt"), ("gradient", "clean")]
    secant, here, there = (
        estimator(name)(gpt2, pairs, ["heads"], run=run)["heads"].double().mean(0).flatten().numpy() for name, run in methods
    )
    score = 0.625 * secant + 0.375 * (here + there) / 2
    expected = reliability("heads", score, np.stack([secant, here, there]))
    by_head = ranking.sort_values(["layer", "head"])
    np.testing.assert_allclose(by_head["score"], score, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(by_head["low"], expected.low, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(by_head["high"], expected.high, rtol=1e-4, atol=1e-6)
    assert by_head["reliable"].tolist() == expected.reliable.tolist()
    assert (by_head["high"] - by_head["low"]).max() > 0.05 * np.abs(score).max()
    assert "low" not in rank_heads(gpt2, pairs, "relp")


@pytest.mark.parametrize("direction", ["mean", "denoising"])
def test_certified_heads_are_those_of_exhaustive_patching(embedded: TransformerBridge, direction: str) -> None:
    pairs = ioi(embedded, n=12)
    ranking = rank_heads(embedded, pairs, certify=4, direction=direction)  # type: ignore[arg-type]
    patched = activation_patching(embedded, pairs, "heads", direction=direction, progress=False)  # type: ignore[arg-type]
    effects = dict(zip(((node.layer, node.head) for node in patched.nodes), patched.effect.double().mean(1).tolist(), strict=True))
    best = sorted(effects, key=lambda head: -abs(effects[head]))[:4]
    assert set(zip(ranking["layer"][:4], ranking["head"][:4], strict=True)) == set(best)
    certificate = ranking.attrs["certificate"]
    rows = ranking[ranking["source"] == "patched"]
    assert 0 < certificate.patched == len(rows) < 16 and set(ranking["source"]) == {"patched", "estimated"}
    for row in rows.itertuples():
        assert row.score == pytest.approx(effects[row.layer, row.head], abs=1e-4) and row.low == row.score == row.high
        values = patched.effect[patched.nodes.index(Node("heads", row.layer, head=row.head))].double()
        assert row.standard_error == pytest.approx(float(values.std() / 12**0.5), rel=1e-3)


def test_neurons_of_one_layer_and_positions(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, n=6)
    neurons = rank_neurons(embedded, pairs, certify=3, layer=2)
    everything = rank_neurons(embedded, pairs)
    assert set(neurons["layer"]) == {2} and len(neurons) == 256 and len(everything) == 4 * 256
    nodes = [Node("neurons", 2, neuron=i) for i in range(256)]
    effects = activation_patching(embedded, pairs, nodes, direction="mean", progress=False).effect.mean(1).abs()
    assert set(neurons["neuron"][:3]) == set(effects.topk(3).indices.tolist())
    attention = rank_positions(embedded, pairs, certify=3)
    patched = activation_patching(embedded, pairs, "attn", direction="mean", progress=False)
    best = patched.effect.nan_to_num(0).mean(1).abs().topk(3).indices.tolist()
    assert {(row.layer, row.position) for row in attention.head(3).itertuples()} == {
        (patched.nodes[i].layer, patched.nodes[i].position) for i in best
    }


def test_a_certified_ranking_goes_on_from_a_checkpoint(
    embedded: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = ioi(embedded, n=4)
    whole = rank_heads(embedded, pairs, certify=4, checkpoint=tmp_path)
    monkeypatch.setattr("analyses.evaluation.patched_effects.activation_patching", None)
    assert rank_heads(embedded, pairs, certify=4, checkpoint=tmp_path).equals(whole)


def test_what_cannot_be_certified(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    with pytest.raises(RelevanceError, match="relp has no intervals"):
        rank_heads(gpt2, pairs, "relp", certify=3)
    with pytest.raises(RelevanceError, match="certify is a number of places"):
        rank_heads(gpt2, pairs, certify=0)
    with pytest.raises(OutOfRangeError, match="there is no layer 9"):
        rank_neurons(gpt2, pairs, layer=9)
    with pytest.raises(RelevanceError, match="rank_positions ranks attn, mlp or resid"):
        rank_positions(gpt2, pairs, component="heads")


def test_padding_has_no_effect(embedded: TransformerBridge) -> None:
    """A pair without a token at a position counts as one in which patching there does nothing, for estimates and effects alike."""
    pairs = ioi(embedded, n=2)
    pad = torch.full((2, 1), 0)
    masks = torch.cat([torch.tensor([[0], [0]]), pairs.clean_mask], 1)
    padded = PromptPairs(torch.cat([pad, pairs.clean], 1), torch.cat([pad, pairs.corrupt], 1), pairs.target, masks, masks)
    ranking = rank_positions(embedded, padded, certify=3)
    assert ranking["score"].notna().all() and (ranking[ranking["position"] == 0]["score"] == 0).all()
