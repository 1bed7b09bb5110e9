"""Checks of activation patching itself, against sums by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.comparison import compare
from analyses.evaluation.reliability import coverage, reliability
from analyses.evaluation.yardstick import yardstick_table, yardstick_warnings
from analyses.patching import activation_patching
from analyses.tasks import ioi
from analyses.views.intervals import interval_view
from lens_relevance import RelevanceError


def test_sums_directions_and_noise_of_a_sound_yardstick() -> None:
    """m = x + y: single effects add up to the gap, and denoising is noising."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(1, 3, (2, 12))
    effects = np.stack([x, y, 0 * x, 0 * x])
    table = yardstick_table({"attn": effects}, {"attn": (effects, effects)}, float((x + y).mean()), n_layers=2)
    assert table["sum_over_gap"][0] == pytest.approx(1.0) and table["directions"][0] == pytest.approx(1.0)
    assert (table["n"][0], table["above_noise"][0], table["near_zero"][0]) == (4, 2, 0.5)
    by_layer = yardstick_table({"resid": np.concatenate([effects, effects])}, {}, float((x + y).mean()), n_layers=2)
    assert by_layer["sum_over_gap"][0] == pytest.approx(1.0) and np.isnan(by_layer["directions"][0])


def test_each_doubt_has_its_sentence() -> None:
    rng = np.random.default_rng(1)
    effects = rng.standard_normal((30, 20))
    against = yardstick_table({"resid": effects}, {"resid": (effects, -effects)}, 10.0, n_layers=3)
    said = yardstick_warnings(against, 0.1, 0.2)
    assert len(said) == 4 and "hardly differs" in said[0] and "correlation -1.00" in said[1] and "of the gap" in said[2]
    assert "above noise" in said[3]
    few = yardstick_table({"heads": effects[:, :4]}, {}, 10.0, n_layers=3)
    assert np.isnan(few["above_noise"][0]) and "too few" in yardstick_warnings(few, 10.0, 0.1)[0]
    clear = np.concatenate([effects[:6] + 20, effects[6:] / 100])
    sound = yardstick_table({"heads": clear}, {"heads": (clear, clear)}, 120.0, n_layers=3)
    assert yardstick_warnings(sound, 120.0, 1.0) == []


def test_an_and_breaks_the_yardstick() -> None:
    """m = x y, 0 when corrupt: alone neither does anything when denoising, and each takes everything when noising."""
    rng = np.random.default_rng(2)
    gate = rng.uniform(2, 3, 16)
    denoising = np.stack([0 * gate, 0 * gate, gate / 9])
    noising = np.stack([gate, gate, gate / 9])
    table = yardstick_table({"attn": (denoising + noising) / 2}, {"attn": (denoising, noising)}, float(gate.mean()), n_layers=1)
    assert table["directions"][0] == pytest.approx(-1.0)
    assert any("needed together" in said for said in yardstick_warnings(table, float(gate.mean()), 0.01))


def test_compare_carries_all_of_it(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, n=10)
    found = compare(embedded, pairs, ["relp", "combined"], components=["resid", "heads"], resamples=0)
    patched = activation_patching(embedded, pairs, ["resid", "heads"], direction="mean", progress=False)
    gap = float((patched.clean - patched.corrupt).mean())  # type: ignore[operator]
    rows = [i for i, node in enumerate(patched.nodes) if node.component == "heads"]
    denoising, noising = (run.effect[rows].double().mean(1).numpy() for run in patched.runs)
    checks = found.yardstick.set_index("component")
    assert checks.loc["heads", "sum_over_gap"] == pytest.approx(float((denoising + noising).sum() / 2 / gap), rel=1e-4)
    assert checks.loc["heads", "directions"] == pytest.approx(float(np.corrcoef(denoising, noising)[0, 1]), abs=1e-6)
    heads = found.scores[found.scores["component"] == "heads"]
    assert found.bracketed is not None and found.bracketed[0] == "combined"
    held = float(((heads["patching"] >= heads["low"] - 1e-5) & (heads["patching"] <= heads["high"] + 1e-5)).mean())
    assert found.bracketed[1]["heads"].inside == pytest.approx(held) and held >= 0.9
    assert ((heads["low"] <= heads["combined"]) & (heads["combined"] <= heads["high"])).all()
    assert heads["top_frequency"].sum() == pytest.approx(3) and heads["q_value"].between(0, 1).any()
    assert found.table["jaccard"].between(0, 1).all()
    assert compare(embedded, pairs, ["relp"], components=["heads"], resamples=0).bracketed is None


def test_bars_are_drawn_where_the_numbers_are() -> None:
    score = np.array([3.0, -1.0, 0.2])
    found = reliability("heads", score, np.array([[1.0, -1.0, 0.2]]))
    frame = pd.DataFrame({"name": ["a", "b", "c"], "score": score, **vars(found), "patching": [2.0, -1.0, np.nan]})
    axis = interval_view(frame).figure().axes[0]
    bars = {round(bar.get_x(), 6): round(bar.get_width(), 6) for bar in axis.patches}  # type: ignore[attr-defined]
    assert bars == {round(low, 6): round(high - low, 6) for low, high in zip(found.low, found.high, strict=True)}
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b", "c"]  # from the top
    assert list(axis.get_yticks()) == [2, 1, 0]
    with pytest.raises(RelevanceError, match="no column 'low'"):
        interval_view(frame.drop(columns="low"))
    with pytest.raises(RelevanceError, match="no scores"):
        interval_view(frame.head(0))
    assert coverage(found, score, frame["patching"].to_numpy()).n == 2
