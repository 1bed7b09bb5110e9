"""Estimators against closed forms; the comparison's figures against figures made another way; the claims about `deeplift`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.agreement import agreement, correlation, intervals
from analyses.evaluation.comparison import COLUMNS, compare, compare_with_patching
from analyses.methods import conductance, direct_logit_attribution, eap_ig, estimator
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs, ioi, pronoun
from lens_relevance import RelevanceError
from lens_relevance.attention_methods import token_relevance
from tests import models
from tests.analyses.test_ranking import random_pairs


def gap(model: TransformerBridge, pairs: PromptPairs) -> torch.Tensor:
    """m(clean) - m(corrupt) per pair."""
    metric = pairs.target.metric(model, pairs.clean, None)  # type: ignore[union-attr]
    with torch.no_grad():
        return metric(model(pairs.clean, return_type="logits")) - metric(model(pairs.corrupt, return_type="logits"))


def test_conductance_is_complete_at_every_layer_as_steps_grow() -> None:
    model, pairs = models.build_gpt2(torch.float64), random_pairs()
    errors = []
    for steps in (4, 32):
        scores = conductance(steps)(model, pairs, ["resid"])["resid"]
        errors.append((scores.sum(2) - gap(model, pairs).unsqueeze(1)).abs().max(0).values / gap(model, pairs).abs().max())
    assert (errors[1] < 2e-2).all() and (errors[1] < errors[0] / 10).all()  # the trapezoid rule is of second order


def test_direct_logit_attribution_is_exact_without_a_norm() -> None:
    """What is written straight to the logits, embeddings included, is all there is."""
    model, pairs = models.build_native(torch.float64, normalization_type=None), random_pairs()
    scores = direct_logit_attribution()(model, pairs, ["resid", "attn", "mlp", "heads"])
    embedded = scores["resid"][:, 0].sum(1)
    total = embedded + scores["attn"].sum((1, 2)) + scores["mlp"].sum((1, 2))
    torch.testing.assert_close(total, gap(model, pairs), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores["heads"].sum(2), scores["attn"].sum(2), rtol=1e-9, atol=1e-9)


def test_direct_logit_attribution_refuses_heads_behind_a_norm() -> None:
    with pytest.raises(RelevanceError, match="ln1_post"):
        direct_logit_attribution()(models.build_gemma2(), random_pairs(), ["heads"])


@pytest.mark.parametrize("build", [models.build_gpt2, models.build_neox, models.build_native])
def test_deeplift_is_complete_in_fp64(build: object) -> None:
    model, pairs = build(dtype=torch.float64), random_pairs()  # type: ignore[operator]
    table = compare_with_patching(model, pairs, ["deeplift", "relp"], components=["heads"], resamples=0)
    complete = table.set_index("method")["completeness"]
    assert complete["deeplift"] < 1e-9 < 1e-3 < complete["relp"]


def test_the_table_holds_what_it_says(gpt2: TransformerBridge) -> None:
    pairs = random_pairs(8)
    found = compare(gpt2, pairs, ["relp", eap_ig(3)], components=["attn", "heads"], direction="denoising", resamples=50)
    assert tuple(found.table.columns) == COLUMNS
    assert repr(found) == "Comparison(attn, heads: denoising of patching, 8 pairs)"
    shown = replace(found, doubts=("a <doubt>",))._repr_html_()
    assert shown.count("<tr") == 5 and "a &lt;doubt&gt;" in shown and f"{found.table['pearson'].iloc[0]:.3f}" in shown
    assert sorted(set(found.table["method"])) == ["eap_ig (3 steps)", "relp"] and len(found.table) == 4
    scores = estimator("relp")(gpt2, pairs, ["attn", "heads"])
    patched = activation_patching(gpt2, pairs, ("attn", "heads"), direction="denoising").to_dataframe()
    for component in ("attn", "heads"):
        row = found.table.set_index(["method", "component"]).loc["relp", component]
        mine, effect = scores[component].mean(0).flatten().numpy(), patched[patched["component"] == component]["effect"].to_numpy(float)
        assert row["pearson"] == pytest.approx(stats.pearsonr(mine, effect).statistic, abs=1e-5)
        assert row["spearman"] == pytest.approx(stats.spearmanr(mine, effect).statistic, abs=0.02)  # rounding can swap ties
        assert row["magnitude_error"] == pytest.approx(np.abs(mine - effect).sum() / np.abs(effect).sum(), rel=1e-4)
        assert row["pearson_low"] <= row["pearson"] <= row["pearson_high"]
        assert (row["forwards"], row["backwards"]) == (2, 1)
        shown = found.scores[found.scores["component"] == component]
        np.testing.assert_allclose(shown["relp"], mine, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(shown["patching"], effect, rtol=1e-4, atol=1e-5)
    assert found.heads("relp").shape == (2, 4)


def test_completeness_is_that_of_the_worst_layer(gpt2: TransformerBridge) -> None:
    pairs = random_pairs(8)
    there = gap(gpt2, pairs).mean()
    errors = (estimator("relp")(gpt2, pairs, ["resid"])["resid"].sum(2).mean(0) - there).abs() / there.abs()
    table = compare_with_patching(gpt2, pairs, ["relp"], components=["heads"], resamples=0)
    assert table["completeness"].iloc[0] == pytest.approx(float(errors.max()), rel=1e-3)
    assert errors.max() > 1.1 * errors.min() > 0


def test_both_runs_take_the_passes_of_both(gpt2: TransformerBridge) -> None:
    """But where both runs are one: rules that compare two runs are symmetric."""
    methods = ["relp", "deeplift", eap_ig(3), conductance(3)]
    table = compare_with_patching(gpt2, random_pairs(2), methods, components=["heads"], run="mean", resamples=0).set_index("method")
    once = compare_with_patching(gpt2, random_pairs(2), methods, components=["heads"], resamples=0).set_index("method")
    assert once.loc["relp", ["forwards", "backwards"]].tolist() == [2, 1]
    for method in table.index:
        times = 1 if method == "deeplift" else 2
        assert table.loc[method, ["forwards", "backwards"]].tolist() == [times * n for n in once.loc[method, ["forwards", "backwards"]]]
    assert once.loc["eap_ig (3 steps)", ["forwards", "backwards"]].tolist() == [5, 3]
    assert once.loc["conductance (3 steps)", ["forwards", "backwards"]].tolist() == [6, 4]


def test_the_best_method_comes_first(gpt2: TransformerBridge) -> None:
    table = compare_with_patching(gpt2, random_pairs(6), ["gradient", "deeplift", "relp"], components=["attn", "heads"], resamples=0)
    means = table.groupby("method", sort=False)["pearson"].mean()
    assert len(means) == 3 and means.is_monotonic_decreasing


def test_intervals_in_the_table_are_those_of_its_scores(gpt2: TransformerBridge) -> None:
    pairs = random_pairs(8)
    row = compare_with_patching(gpt2, pairs, ["relp"], components=["heads"], direction="noising", resamples=300).iloc[0]
    estimate = estimator("relp")(gpt2, pairs, ["heads"])["heads"].flatten(1).T.double().numpy()
    effect = activation_patching(gpt2, pairs, "heads", direction="noising").effect.double().numpy()
    expected = intervals(estimate, effect, 300)
    for name in ("pearson", "spearman"):
        assert (row[f"{name}_low"], row[f"{name}_high"]) == pytest.approx(expected[name], abs=5e-3)
        assert row[f"{name}_low"] < row[f"{name}_high"]
    assert abs(row["pearson_low"] - row["spearman_low"]) > 0.01


def test_the_direction_chooses_the_yardstick(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    patching = {
        direction: compare(gpt2, pairs, ["relp"], components=["heads"], direction=direction, resamples=0).heads("patching")  # type: ignore[arg-type]
        for direction in ("denoising", "noising", "mean")
    }
    assert np.abs(patching["denoising"] - patching["noising"]).max() > 1e-3
    np.testing.assert_allclose(patching["mean"], (patching["denoising"] + patching["noising"]) / 2, rtol=1e-4, atol=1e-5)


def test_pairs_of_several_lengths(gpt2: TransformerBridge) -> None:
    """Positions that only some pairs have are averaged over those; positions that none has are left out."""
    short, long = random_pairs(3, pos=6), random_pairs(3, pos=8)
    filler = torch.zeros(3, 2, dtype=torch.long)
    clean, corrupt = (torch.cat([torch.cat([a, filler], 1), b]) for a, b in ((short.clean, long.clean), (short.corrupt, long.corrupt)))
    mask = torch.ones_like(clean)
    mask[:3, 6:] = 0
    answers = torch.tensor([1, 2, 3, 4, 5, 6])
    pairs = PromptPairs(clean, corrupt, type(short.target)("logit", answers), mask, mask)  # type: ignore[call-arg]
    table = compare_with_patching(gpt2, pairs, ["deeplift"], resamples=20)
    assert np.isfinite(table[["pearson", "spearman", "magnitude_error"]].to_numpy(float)).all()
    assert table["completeness"].max() < 1e-4


def test_token_relevance_scores_heads_alone(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    found = compare(gpt2, pairs, ["weighted_accumulation", "relp"], components=["attn", "heads"], resamples=0)
    assert list(found.table["method"]) == ["relp", "relp", "weighted_accumulation"] and found.table["component"].iloc[2] == "heads"
    expected = token_relevance(gpt2, pairs.clean, pairs.target, method="weighted_accumulation").heads.mean(0)
    np.testing.assert_allclose(found.heads("weighted_accumulation"), expected.detach(), rtol=1e-4, atol=1e-6)
    for run in ("corrupt", "clean", "both"):
        assert torch.equal(*(estimator("rollout")(gpt2, pairs, ["heads"], run=way)["heads"] for way in (run, "clean")))  # type: ignore[arg-type]
    with pytest.raises(RelevanceError, match="rollout scores heads, not mlp"):
        estimator("rollout")(gpt2, pairs, ["mlp"])


def test_pooled_correlates_over_pairs_too(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    row = compare_with_patching(gpt2, pairs, ["relp"], components=["heads"], direction="denoising", pooled=True, resamples=0).iloc[0]
    mine = estimator("relp")(gpt2, pairs, ["heads"])["heads"].flatten(1).T.flatten().numpy()
    effect = activation_patching(gpt2, pairs, "z", direction="denoising").effect.flatten().numpy()
    assert row["pearson"] == pytest.approx(stats.pearsonr(mine, effect).statistic, abs=1e-5)


def test_agreement_by_hand() -> None:
    found = agreement(np.array([2.0, -1.0, 0.5, 0.0]), np.array([4.0, 2.0, 1.0, 0.001]), top_k=2)
    assert found.sign_agreement == pytest.approx(2 / 3)  # the fourth effect is too small to have a sign
    assert found.top_k_overlap == 1.0
    assert found.magnitude_error == pytest.approx((2 + 3 + 0.5 + 0.001) / 7.001)
    assert np.isnan(agreement(np.zeros(4), np.array([1.0, 2.0, 3.0, 4.0]), 2).pearson)
    assert np.isnan(agreement(np.array([1.0, 2.0]), np.zeros(2), 1).magnitude_error)


def test_correlation_leaves_out_what_is_missing() -> None:
    x, y = np.array([[1.0, 2.0, np.nan, 5.0]]), np.array([[2.0, 1.0, 9.0, 4.0]])
    assert correlation(x, y)[0] == pytest.approx(stats.pearsonr([1, 2, 5], [2, 1, 4]).statistic)


def test_intervals_narrow_with_more_pairs_and_are_reproducible() -> None:
    rng = np.random.default_rng(0)
    component = rng.normal(size=(30, 1))
    estimates, effects = (component + 2 * rng.normal(size=(30, 400)) for _ in range(2))
    few, many = (intervals(estimates[:, :n], effects[:, :n], 200)["pearson"] for n in (10, 400))
    assert many[1] - many[0] < few[1] - few[0]
    assert intervals(estimates, effects, 50) == intervals(estimates, effects, 50)
    assert np.isnan(intervals(estimates[:, :1], effects[:, :1], 50)["pearson"][0])


def test_intervals_hold_95_percent_of_resamples_of_pairs() -> None:
    """Of a bootstrap written out (pairs drawn one by one, estimate and effect of a pair together) 2.5 % lie on either side."""
    rng = np.random.default_rng(3)
    component, of_pairs = rng.normal(size=(40, 1)), 4 * rng.normal(size=(40, 15))
    estimates, effects = (component + of_pairs + rng.normal(size=(40, 15)) for _ in range(2))
    found = intervals(estimates, effects, 3000)
    drawn = rng.integers(15, size=(3000, 15))
    one, other = (values[:, drawn].mean(2) for values in (estimates, effects))  # [component, resample]
    for name, scale in (("pearson", np.asarray), ("spearman", lambda values: stats.rankdata(values, axis=0))):
        resampled = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(scale(one).T, scale(other).T, strict=True)])
        below, above = ((resampled < found[name][0]).mean(), (resampled > found[name][1]).mean())
        assert 0.015 < below < 0.035 and 0.015 < above < 0.035  # chance alone: 0.004 around 0.025


@pytest.mark.parametrize(
    ("methods", "components", "message"),
    [(["nonsense"], ["heads"], "unknown method"), (["relp"], ["tails"], "unknown component 'tails'"), ([], ["heads"], "at least one")],
)
def test_bad_arguments(gpt2: TransformerBridge, methods: list[str], components: list[str], message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        compare_with_patching(gpt2, random_pairs(), methods, components=components)


def test_a_metric_that_cannot_tell_the_runs_apart_is_warned_of(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    with pytest.warns(UserWarning):
        compare_with_patching(gpt2, PromptPairs(pairs.clean, pairs.clean, pairs.target), ["relp"], components=["heads"], resamples=0)


def test_deeplift_agrees_with_patching_on_the_embedded_model(embedded: TransformerBridge) -> None:
    table = compare_with_patching(embedded, ioi(embedded, n=64), ["deeplift", "attnlrp", "gradient"], resamples=0)
    cells = table.pivot(index="method", columns="component", values="pearson")
    assert (cells.loc["deeplift"] >= 0.97).all(), cells
    assert table["method"].iloc[0] == "deeplift"


@pytest.mark.slow
def test_deeplift_agrees_with_patching_on_a_trained_llama(stories: TransformerBridge) -> None:
    table = compare_with_patching(stories, pronoun(stories, n=6), ["deeplift", "relp"], resamples=0)
    cells = table.pivot(index="method", columns="component", values="pearson")
    assert (cells.loc["deeplift"] >= 0.97).all(), cells
    assert (cells.loc["deeplift"] > cells.loc["relp"]).all()
