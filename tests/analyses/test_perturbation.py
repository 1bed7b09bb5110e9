"""Perturbation tests: orders and areas against hand-made cases, text removal against direct forwards, methods, padding and bad input."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.benchmarks.perturbation import BASELINES as REMOVALS
from analyses.benchmarks.perturbation import METHODS, PROMPTS, seconds
from analyses.perturbation import (
    BASELINES,
    TextRemoval,
    against,
    areas,
    attribution,
    by_attention,
    curves_view,
    occlusion,
    perturbation_curves,
    random_order,
    removal_curves,
    summary,
)
from lens_relevance import RelevanceError, log_prob, logit, logit_diff, mean_embedding, propagate, random_tokens
from lens_relevance.inputs.prompt import Prompt
from tests import models

TARGET = logit(7)
FEW = ("mean_embedding", "delete")
WORTH = torch.tensor([[5.0, 1.0, 3.0, 0.0], [2.0, 4.0, 1.0, 0.0]])


def worth_left(rows: torch.Tensor, removed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A game in which every item has its worth, whatever else is there."""
    left = (WORTH[rows] * ~removed).sum(1)
    return left, left > 4


def test_curves_and_areas_of_a_known_game():
    removable = torch.tensor([[True, True, True, False]] * 2)
    curves = removal_curves(WORTH, removable, worth_left)
    first = curves[curves["example"] == 0].set_index(["order", "removed"])["value"]
    assert first["MoRF"].tolist() == [9, 4, 1, 0] and first["LeRF"].tolist() == [9, 8, 5, 0]
    found = areas(curves).set_index("example")
    assert found.loc[0, "morf"] == pytest.approx((9 / 2 + 4 + 1 + 0) / 3)
    assert found.loc[0, "lerf"] == pytest.approx((9 / 2 + 8 + 5 + 0) / 3)
    assert found.loc[0, "area"] == pytest.approx(8 / 3)
    assert found.loc[0, "positive"] == pytest.approx(1 / 2 / 3) and found.loc[0, "negative"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    backwards = areas(removal_curves(-WORTH, removable, worth_left)).set_index("example")
    np.testing.assert_allclose(backwards["area"], -found["area"])


def test_the_interval_of_a_mean_over_examples_is_one_of_95_percent():
    """Of the mean of 400 examples, within 1.96 standard errors; 1.64 would be one of 90 percent."""
    area = np.random.default_rng(0).normal(3, 2, size=400)
    columns = ["morf", "lerf", "positive", "negative"]
    row = summary(pd.DataFrame({"method": "m", "example": range(400), "area": area} | dict.fromkeys(columns, 0.0)), draws=4000).iloc[0]
    error = area.std(ddof=1) / 20
    assert row["area"] == pytest.approx(area.mean()) and row["examples"] == 400
    assert (row["area"] - row["area_low"]) / error == pytest.approx(1.96, abs=0.15)
    assert (row["area_high"] - row["area"]) / error == pytest.approx(1.96, abs=0.15)


def test_few_steps_and_items_that_stay():
    removable = torch.tensor([[True, True, True, True], [True, False, True, False]])
    asked = []

    def evaluate(rows, removed):
        asked.append(removed & ~removable[rows])
        return worth_left(rows, removed)

    curves = removal_curves(WORTH, removable, evaluate, steps=2)
    assert curves[curves["example"] == 0]["share"].tolist() == [0, 0.5, 1] * 2
    assert curves[curves["example"] == 1]["removed"].tolist() == [0, 1, 2] * 2
    assert not torch.cat(asked).any()


def test_the_first_token_stays_and_padding_is_never_touched(gpt2):
    tokens, mask = models.random_tokens(), torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    curves = perturbation_curves(gpt2, tokens, TARGET, methods=["attnlrp"], baselines=FEW, attention_mask=mask)
    counts = curves.groupby("example")["removed"].max()
    assert counts.tolist() == [3, 5]
    alone = perturbation_curves(gpt2, tokens[:1, :4], TARGET, methods=["attnlrp"], baselines=FEW)
    for baseline in FEW:
        both = [c[(c["example"] == 0) & (c["baseline"] == baseline) & (c["method"] == "attnlrp")] for c in (curves, alone)]
        np.testing.assert_allclose(both[0]["value"], both[1]["value"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", ["mean_embedding", "zero_embedding", "random_tokens", "delete"])
def test_removal_equals_a_direct_forward(gpt2, tokens, baseline):
    removal = TextRemoval(gpt2, tokens, torch.ones_like(tokens), target=logit_diff([7, 8], [1, 2]), baseline=baseline, seed=3, batch_size=2)
    rows, removed = torch.tensor([1, 0, 1]), torch.zeros(3, 6, dtype=torch.bool)
    removed[0, 2] = removed[1, 1:4] = True
    value, same = removal(rows, removed)
    table, (answer, wrong) = gpt2.W_E.detach(), (torch.tensor([7, 8]), torch.tensor([1, 2]))
    for i, row in enumerate(rows.tolist()):
        if baseline == "delete":
            logits = gpt2(tokens[row][~removed[i]][None])
        else:
            drawn = random_tokens(1, 3).run(gpt2, Prompt(tokens, torch.ones_like(tokens))).prompt.tokens[row]
            filler = {"mean_embedding": table.mean(0), "zero_embedding": 0 * table[0], "random_tokens": table[drawn]}[baseline]
            embeddings = torch.where(removed[i][:, None], filler, table[tokens[row]])
            hook = ("embed.hook_out", lambda x, hook, e=embeddings: e[None])
            logits = gpt2.run_with_hooks(tokens[row][None], fwd_hooks=[hook])
        last = logits[0, -1]
        assert value[i].item() == pytest.approx((last[answer[row]] - last[wrong[row]]).item(), abs=1e-4)
        assert bool(same[i]) == bool(last.argmax() == gpt2(tokens[row][None])[0, -1].argmax())
    assert bool(same[2]) and value.unique().numel() == 3


def test_occlusion_is_the_fall_of_the_target(gpt2, tokens):
    found = occlusion()(gpt2, tokens, TARGET, torch.ones_like(tokens))
    removal = TextRemoval(gpt2, tokens, torch.ones_like(tokens), target=TARGET, baseline="mean_embedding")
    for position in range(6):
        removed = torch.zeros(2, 6, dtype=torch.bool)
        removed[:, position] = True
        whole, without = removal(torch.arange(2), 0 * removed > 0)[0], removal(torch.arange(2), removed)[0]
        torch.testing.assert_close(found[:, position], whole - without, rtol=1e-5, atol=1e-6)  # other prompts run beside it


def test_every_name_gives_one_score_per_token(gpt2, tokens):
    mask = torch.ones_like(tokens)
    names = ["attnlrp", "deeplift", "chefer", "weighted_accumulation", "rollout", "occlusion", "random"]
    scores = {name: attribution(name)(gpt2, tokens, TARGET, mask) for name in names}
    assert all(s.shape == tokens.shape and torch.isfinite(s).all() for s in scores.values())
    torch.testing.assert_close(scores["deeplift"], propagate(gpt2, tokens, TARGET, reference=mean_embedding()).tokens())
    other = models.random_tokens(seed=5)
    runs = [propagate(gpt2, tokens, TARGET, reference=r).tokens() for r in (mean_embedding(), other)]
    torch.testing.assert_close(against(mean_embedding(), other)(gpt2, tokens, TARGET, mask), (runs[0] + runs[1]) / 2)
    assert not torch.allclose(
        attribution(by_attention("weighted_accumulation", "norm"))(gpt2, tokens, TARGET, mask), scores["chefer"], atol=1e-3
    )


def test_tables_of_several_methods(gpt2, tokens):
    methods = {"deeplift": "deeplift", "mine": lambda model, tokens, target, mask: -tokens.float()}
    curves = perturbation_curves(gpt2, tokens, None, methods=methods, baselines=FEW)
    assert list(curves.columns) == ["method", "baseline", "example", "order", "removed", "share", "value", "same_prediction"]
    start = curves[curves["removed"] == 0]
    assert (start["same_prediction"] == 1).all() and (start["value"] > 0).all()  # the top prediction against its runner-up
    table = areas(curves)
    assert set(table["method"]) == {"random", "deeplift", "mine"} and len(table) == 3 * 2 * 2
    assert (table.loc[table["method"] == "random", "above_random"] == 0).all()
    np.testing.assert_allclose(table["area"], table["lerf"] - table["morf"])
    short = summary(table)
    assert (short["area_low"] <= short["area"]).all() and (short["area"] <= short["area_high"]).all() and (short["examples"] == 2).all()
    again = perturbation_curves(gpt2, tokens, None, methods=methods, baselines=FEW, batch_size=3)
    pd.testing.assert_frame_equal(curves, again, rtol=1e-4, atol=1e-4)
    assert "MoRF" in curves_view(curves, "delete").html


def test_a_trained_model_beats_a_random_order(stories):
    prompts = [
        "Once upon a time, there was a little girl named Lily. Lily was very happy because",
        "Once upon a time, there was a little boy named Tim. Tim was very sad because",
    ]
    target = logit_diff(["she", "he"], ["he", "she"])
    curves = perturbation_curves(
        stories, prompts, target, methods=["attnlrp", "chefer"], baselines=["mean_embedding", "pad_token"], steps=8
    )
    table = areas(curves).groupby("method")["area"].mean()
    assert table["attnlrp"] > table["random"] and table["chefer"] > table["random"]


def test_the_benchmark_measures_what_it_says(embedded):
    taken, n_curves = seconds(embedded, PROMPTS[1])
    assert taken > 0 and n_curves == (len(METHODS) + 1) * len(REMOVALS) * 2  # with the random order


def test_bad_input(gpt2, tokens):
    ones = torch.ones_like(tokens)
    for call, message in [
        (lambda: perturbation_curves(gpt2, tokens, TARGET, methods=["shap"]), "unknown method 'shap'; choose one of"),
        (lambda: perturbation_curves(gpt2, tokens, TARGET, methods=[]), "at least one method"),
        (
            lambda: perturbation_curves(gpt2, tokens, TARGET, methods=["random"], baselines=["blank"]),
            f"unknown baseline 'blank'.*{BASELINES[0]}",
        ),
        (
            lambda: perturbation_curves(gpt2, tokens[:, :1], TARGET, methods=["random"]),
            r"nothing can be removed from example\(s\) \[0, 1\]",
        ),
        (
            lambda: perturbation_curves(gpt2, tokens, TARGET, methods={"x": lambda *a: torch.ones(2, 5)}),
            r"shape \(2, 5\), the inputs \(2, 6\)",
        ),
        (lambda: perturbation_curves(gpt2, tokens, TARGET, methods={"x": lambda *a: torch.full((2, 6), torch.nan)}), "not finite"),
        (lambda: TextRemoval(gpt2, tokens, ones, target=log_prob(3, position=2), baseline="delete"), "'delete' moves tokens"),
        (lambda: TextRemoval(gpt2, tokens, ones, target=TARGET, baseline="pad_token"), "neither a pad nor an unk token"),
        (lambda: against(), "at least one reference"),
    ]:
        with pytest.raises(RelevanceError, match=message):
            call()


def test_the_random_order_is_each_prompts_own(gpt2) -> None:
    order = attribution("random")
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 6]])
    scores = order(gpt2, tokens, TARGET, torch.ones_like(tokens))
    assert torch.equal(scores[0], scores[2]) and not torch.equal(scores[0].argsort(), scores[1].argsort())
    for row in range(3):  # one by one as in a batch
        assert torch.equal(order(gpt2, tokens[row : row + 1], TARGET, torch.ones(1, 6))[0], scores[row])
    assert not torch.equal(random_order(seed=1)(gpt2, tokens, TARGET, torch.ones_like(tokens)), scores)
    places = torch.stack([order(gpt2, torch.randint(9, (1, 6)), TARGET, torch.ones(1, 6))[0].argmax() for _ in range(200)])
    assert (places.bincount(minlength=6) > 10).all()
