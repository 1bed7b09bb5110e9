"""The vision-language model and its experiment: pictures, questions, every ruleset on the trained model, the committed table."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from analyses.vision_language import FOLDER, VisionLanguageModel, load_vision_language
from analyses.vision_language.experiment import (
    CANDIDATES,
    CHOSEN,
    INTRODUCTION,
    METHODS,
    TEST_SPLIT,
    condensed,
    localisation,
    markdown,
    measure,
    split,
)
from analyses.vision_language.methods import inputs_of
from analyses.vision_language.model import IMAGE, QUESTION
from analyses.vision_language.picture_view import picture_view
from analyses.vision_language.pictures import COLOURS, GRID, N_PATCHES, PATCH, SHAPES, Thing, draw, scatter
from analyses.vision_language.questions import ANSWERS, PAD, caption, captioned, examples, ids, questions_about, quizzed, words
from analyses.vision_language.train import accuracies, train
from lens_relevance import RelevanceError, coverage, logit, propagate, rulesets
from lens_relevance.ruleset_tables import needs_reference
from tests.engine.families import RULESETS


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return load_vision_language()


def test_patches_of_a_thing_are_those_it_is_drawn_on() -> None:
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        (thing,) = scatter(rng, [(shape, "red")])
        with_it, without = (draw(np.random.default_rng(1), things) for things in ((thing,), ()))
        changed = torch.from_numpy(np.abs(with_it - without).sum(0) > 0.05)
        cut = changed.reshape(GRID, PATCH, GRID, PATCH).any(3).any(1).flatten()
        assert cut.tolist() == thing.patches().tolist() and 2 <= cut.sum() <= 9


def test_questions_have_the_answer_that_the_things_give() -> None:
    things = (Thing("circle", "red", 0, 0), Thing("square", "blue", 0, 10), Thing("square", "red", 10, 0))
    asked = {question: (kind, answer, set(those)) for kind, question, answer, those in questions_about(things)}
    assert asked == {
        "what colour is the circle ?": ("colour", "red", {things[0]}),
        "how many circles are there ?": ("count", "one", {things[0]}),
        "how many squares are there ?": ("count", "two", set(things[1:])),
        "how many things are red ?": ("count", "two", {things[0], things[2]}),
        "which shape is blue here ?": ("shape", "square", {things[1]}),
        "how many things are blue ?": ("count", "one", {things[1]}),
    }
    assert caption(things) == "red circle and red square and blue square ."
    with pytest.raises(RelevanceError, match="not in the vocabulary: purple"):
        ids("purple circle")


def test_examples_are_balanced_and_repeat() -> None:
    drawn, again = examples(90, 4), examples(90, 4)
    assert torch.equal(drawn.images, again.images) and not torch.equal(drawn.images, examples(90, 5).images)
    assert Counter(drawn.kind) == {"colour": 30, "shape": 30, "count": 30}
    answers = Counter(ANSWERS[i] for i in drawn.answers.tolist())
    assert [answers[count] for count in ("one", "two", "three")] == [10, 10, 10] and all(answers[a] for a in (*COLOURS, *SHAPES))
    assert drawn.relevant.any(1).all() and words(drawn.questions[0])[-1] == "?"
    images, questions, right = quizzed(5, 0, 3)
    assert images.shape == (5, 3, 24, 24) and questions.shape == (5, 3, 6) and right.shape == (5, 3)
    _, lines = captioned(6, 0)
    assert (lines != PAD).sum(1).tolist() == [len([w for w in words(line) if w != "<pad>"]) for line in lines]


def test_the_model_answers_new_pictures(model: VisionLanguageModel) -> None:
    found = accuracies(model, examples(900, 77))
    assert found["questions"] >= 0.95 and min(found.values()) > 0.9
    recorded = json.loads((FOLDER / "training.json").read_text())["held out"]
    assert recorded["questions"] == pytest.approx(found["questions"], abs=0.03)
    assert (FOLDER / "model.safetensors").stat().st_size < 1_500_000


def test_every_ruleset_holds_at_every_site() -> None:
    asked = examples(2, 5)
    found = coverage(load_vision_language(torch.float64), inputs={IMAGE: asked.images.double(), QUESTION: asked.questions})
    assert found.rulesets["works"].equals(found.rulesets["applies"]) and found.rulesets["unexplained"].max() < 1e-10 and not found.uncovered
    assert found.sites["live"].all() and found.sites["off"].max() < 1e-12 and len(found.sites) == 80


def test_the_forward_is_left_alone_and_deeplift_adds_up() -> None:
    model, asked = load_vision_language(torch.float64), examples(3, 5)
    inputs = {IMAGE: asked.images.double(), QUESTION: asked.questions}
    other = {IMAGE: examples(3, 6).images.double(), QUESTION: examples(3, 8).questions.roll(1, 0)}
    logits = model(**inputs)
    for rules in RULESETS:
        cache = propagate(model, inputs, logit(2), rules=rules, reference=other if needs_reference(rulesets()[rules]) else None)
        assert torch.equal(cache.logits, logits), rules
        if rules == "deeplift":
            assert cache.reference_value is not None
            total = cache.tokens(stack=IMAGE).sum(1) + cache.tokens(stack=QUESTION).sum(1)
            torch.testing.assert_close(total, cache.value - cache.reference_value, rtol=1e-10, atol=1e-10)
            assert total.abs().min() > 0.1


def test_training_runs() -> None:
    trained, figures = train(seed=0, pictures=80, matching_steps=2, answering_steps=2, held_out=30)
    assert not trained.training and set(figures) == {"caption of 128", "questions", "colour", "shape", "count"}


def test_the_picture_carries_its_numbers() -> None:
    asked = examples(1, 0)
    view = picture_view(asked.images[0], {"mine": torch.arange(36.0)}, "what is it ?", relevant=asked.relevant[0])
    assert "what is it ?" in view.html and "35" in view.html and view.png().startswith(b"\x89PNG")
    assert len(view.figure().axes) == 2
    with pytest.raises(RelevanceError, match="mine has 9 scores, the picture 36 patches"):
        picture_view(asked.images[0], {"mine": torch.zeros(9)}, "")


def test_localisation_is_the_share_of_positive_relevance() -> None:
    asked = examples(2, 0)
    scores = torch.full((2, N_PATCHES), -1.0)
    inside, outside = (rows.nonzero()[0, 0] for rows in (asked.relevant[0], ~asked.relevant[0]))
    scores[0, inside], scores[0, outside] = 3.0, 1.0
    assert localisation(scores, asked).tolist() == [0.75, 0.0]


def test_the_measure_on_a_few_questions(model: VisionLanguageModel) -> None:
    asked = split(model, 9, 21)
    with torch.no_grad():
        assert (model(**inputs_of(asked))[:, -1].argmax(-1) == asked.answers).all() and len(asked) == 9
    chosen = {name: METHODS[name] for name in ("random", "attnlrp", "deeplift, mean_patch", "weighted accumulation")}
    found = condensed(measure(model, asked, chosen), draws=200).set_index(["set", "method"])
    assert len(found) == 8 and (found["questions"] == 9).all()
    assert (found["area_low"] <= found["area"]).all() and (found["area"] <= found["area_high"]).all()
    np.testing.assert_allclose(found["area"], found["lerf"] - found["morf"])
    assert found.loc[(IMAGE, "deeplift, mean_patch"), "area"] > found.loc[(IMAGE, "random"), "area"] + 2
    assert found.loc[IMAGE, "localisation"].between(0, 1).all() and found.loc[QUESTION, "localisation"].isna().all()


def test_the_committed_figures_are_what_a_fresh_run_finds(model: VisionLanguageModel) -> None:
    """On fewer questions, within what the choice of questions makes."""
    names = ["deeplift, mean_patch", "raw attention"]
    table = measure(model, split(model, 24, TEST_SPLIT), {name: METHODS[name] for name in names}, sets=(IMAGE,))
    committed = pd.read_csv(FOLDER / "results.csv").query("set == @IMAGE").set_index("method")
    by_question = table.groupby(["method", "example"])[["area", "localisation"]].mean()
    for name in names:
        fresh = by_question.loc[name]
        error = fresh.std() / len(fresh) ** 0.5
        assert (error < [1.5, 0.08]).all()
        assert ((fresh.mean() - committed.loc[name, ["area", "localisation"]]).abs() < 3.5 * error).all(), name
    assert committed.loc[names[0], "area"] - committed.loc[names[1], "area"] > 2


def test_the_committed_page_and_choice_are_those_of_the_committed_figures() -> None:
    found = pd.read_csv(FOLDER / "results.csv")
    written = (FOLDER / "results.md").read_text()
    assert markdown(found) in written and INTRODUCTION.format(n=found["questions"].max(), tried=len(CANDIDATES)) in written
    assert set(found["method"]) == set(METHODS) and found["questions"].min() >= 500
    tried = pd.read_csv(FOLDER / "selection.csv").query("set == @IMAGE")
    assert set(tried["method"]) == set(CANDIDATES)
    for family, name in CHOSEN.items():
        of_family = tried[tried["method"].str.startswith(f"{family}, ")]
        assert of_family.sort_values("area")["method"].iloc[-1] == name
