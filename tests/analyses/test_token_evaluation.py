"""Methods of token relevance evaluated: the table, its checkpoint, random weights, the prompts it is made on, and the command."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

from analyses.cli import app
from analyses.evaluation import token_relevance
from analyses.evaluation.evaluated_prompts import answered, answered_pairs, prompts_alone
from analyses.evaluation.passes import counted
from analyses.evaluation.randomised_weights import randomised_weights, weight_parts
from analyses.evaluation.removal_measures import saco
from analyses.evaluation.token_relevance import evaluate_token_relevance, evidence_of, removable_of, token_methods
from analyses.evaluation.token_tables import measures_frame, notes, randomised_frame
from analyses.methods import estimator
from analyses.perturbation import TextRemoval, attribution, passes
from analyses.tasks import PromptPairs, ioi
from lens_relevance import RelevanceError, logit_diff, propagate
from tests.fixtures import STORIES

Evaluated = tuple[PromptPairs, token_relevance.TokenEvaluation, Path]
METHODS = ["attnlrp", "rollout", "occlusion", "random"]
COMMAND = ("evaluate", "--n", "2", "--methods", "attnlrp", "--randomised", "1")


@pytest.fixture(scope="module")
def evaluated(_embedded: TransformerBridge, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("evaluation") / "checkpoint"
    pairs, words = answered_pairs(_embedded, "ioi", 4, seed=2)
    assert words.startswith("4 prompts of the task ioi, those of the first ")
    return pairs, evaluate_token_relevance(_embedded, pairs, METHODS, randomised_prompts=2, batch_size=2, checkpoint=folder), folder


def test_the_table_holds_means_over_prompts_of_the_measures(embedded: TransformerBridge, evaluated: Evaluated) -> None:
    pairs, found, _ = evaluated
    assert found.table.columns.tolist() == list(token_relevance.COLUMNS) and found.table["method"].tolist() == METHODS
    table = found.table.set_index("method")
    scores = attribution("attnlrp")(embedded, pairs.clean, pairs.target, pairs.clean_mask)
    removable = torch.ones_like(pairs.clean, dtype=torch.bool)
    removable[:, 0] = False
    removal = TextRemoval(embedded, pairs.clean, pairs.clean_mask, target=pairs.target, baseline="mean_embedding")
    assert table.loc["attnlrp", "saco"] == pytest.approx(saco(scores.double(), removable, removal).mean().item(), abs=1e-5)
    for name in token_relevance.MEASURES:
        assert (table[f"{name}_low"] <= table[name]).all() and (table[name] <= table[f"{name}_high"]).all()
    assert table.loc["attnlrp", "saco"] > 0.5 > table.loc["random", "saco"]
    assert table.loc["attnlrp", "plausibility"] > 2 * table.loc["random", "plausibility"]
    assert table.loc["attnlrp", ["forwards", "backwards"]].tolist() == [1, 1]
    assert table.loc["random", ["forwards", "backwards"]].tolist() == [0, 0]
    assert table.loc["occlusion", "backwards"] == 0 and table.loc["occlusion", "forwards"] > 5
    assert found.chance == pytest.approx(1 / (pairs.clean.shape[1] - 1))  # one name of the prompt's words


def test_evidence_is_what_differs_between_the_prompts(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, 6)
    assert torch.equal(evidence_of(pairs), pairs.clean != pairs.corrupt) and int(evidence_of(pairs).sum()) == 6
    alone = prompts_alone(embedded, ["When Mary and John went to the store", "Mary and John"])
    assert not evidence_of(alone).any() and removable_of(alone).sum(1).tolist() == [8, 3]
    found = evaluate_token_relevance(embedded, alone, ["attnlrp"], randomised_prompts=0)
    assert np.isnan(found.chance) and found.table["plausibility"].isna().all() and found.table["saco"].notna().all()
    assert len(found.randomised) == 0 and "AUPRC" not in measures_frame(found)
    with torch.no_grad():
        top = embedded("Mary and John", return_type="logits")[0, -1].topk(2).indices
    target = alone.target
    assert [target.answer[1], target.wrong[1]] == top.tolist()  # type: ignore[attr-defined]


def test_random_weights_are_the_correlation_with_a_random_model_s_scores(embedded: TransformerBridge, evaluated: Evaluated) -> None:
    pairs, found, _ = evaluated
    assert set(found.randomised["method"]) == {"attnlrp", "rollout"}  # the others take no backward pass
    few, parts = pairs[:2], weight_parts(embedded)

    def scores() -> np.ndarray:
        return (
            propagate(embedded, few.clean, few.target, rules="attnlrp", names_filter=["hook_embed", "hook_pos_embed"])
            .tokens()[:, 1:]
            .numpy()
        )

    trained, layer = scores(), "layer 1"
    above = list(parts)[: list(parts).index(layer) + 1]
    for kind, random in {"independent": [layer], "cascading": above}.items():
        with randomised_weights({name: parts[name] for name in random}):
            expected = np.mean([spearmanr(a, b).statistic for a, b in zip(trained, scores(), strict=True)])
        of_kind = found.randomised[found.randomised["kind"] == kind]
        rows = of_kind.query("method == 'attnlrp' and part == @layer")
        assert len(rows) == 1 and rows["spearman"].item() == pytest.approx(expected, abs=0.02) and abs(expected) > 0.01
    whole = found.after_randomisation.set_index("method")["spearman"]
    assert list(whole.index) == ["attnlrp", "rollout"]
    assert found.unchanged == [name for name in whole.index if whole[name] >= 0.5]
    gone = found.randomised.assign(spearman=np.nan)
    assert notes(dataclasses.replace(found, randomised=gone))[-1].startswith("Not known of attnlrp, rollout: ")
    assert not any(line.startswith("Not known") for line in notes(found))
    assert randomised_frame(found, "cascading").columns.tolist() == [
        "method",
        *found.randomised.query("kind == 'cascading'")["part"].unique(),
    ]


def test_a_checkpoint_goes_on_with_other_methods(
    embedded: TransformerBridge, evaluated: Evaluated, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, found, folder = evaluated
    asked: list[str] = []
    original = token_relevance._Step.__call__

    def noted(self: Any, batch: PromptPairs, method: Any) -> dict[str, torch.Tensor]:
        asked.append("step")
        return original(self, batch, method)

    monkeypatch.setattr(token_relevance._Step, "__call__", noted)
    again = evaluate_token_relevance(embedded, pairs, [*METHODS, "gradient"], randomised_prompts=2, batch_size=2, checkpoint=folder)
    assert len(asked) == 2  # batches of the method that is new
    pd.testing.assert_frame_equal(again.table[:4], found.table)
    pd.testing.assert_frame_equal(again.randomised.query("method != 'gradient'").reset_index(drop=True), found.randomised)
    with pytest.raises(RelevanceError, match="checkpoint of another run"):
        evaluate_token_relevance(embedded, pairs, METHODS, baseline="zero_embedding", batch_size=2, checkpoint=folder)


def test_every_method_that_scores_tokens_is_there_once(embedded: TransformerBridge) -> None:
    names = token_methods()
    assert len(names) == len(set(names)) >= 20 and {"deeplift", "chefer_2021b", "occlusion", "random"} <= set(names)
    assert "chefer" not in names and all(estimator(name).tokens for name in names if name not in ("occlusion", "random"))
    pairs = ioi(embedded, 1)
    with pytest.raises(RelevanceError, match="at least one method"):
        evaluate_token_relevance(embedded, pairs, [])
    with pytest.raises(RelevanceError, match="norm@q_norm"):  # named, and impossible here
        evaluate_token_relevance(embedded, pairs, ["attnlrp_plain_qk"])


def test_methods_that_a_model_does_not_allow_are_left_out_with_the_reason(
    embedded: TransformerBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_relevance, "token_methods", lambda: ["attnlrp_plain_qk", "gradient"])
    found = evaluate_token_relevance(embedded, ioi(embedded, 2), randomised_prompts=0)
    assert found.table["method"].tolist() == ["gradient"] and "norm@q_norm" in found.left_out["attnlrp_plain_qk"]
    assert any(line.startswith("attnlrp_plain_qk is left out: ") for line in notes(found))
    cheap = evaluate_token_relevance(embedded, ioi(embedded, 1), ["occlusion", "gradient"], randomised_prompts=0, most_passes=2)
    assert cheap.table["method"].tolist() == ["gradient"] and list(cheap.left_out) == ["occlusion"]


def test_passes_are_counted_in_tokens(gpt2: TransformerBridge, tokens: torch.Tensor) -> None:
    with counted(gpt2) as cost:
        propagate(gpt2, tokens, logit_diff(3, 4), reference=tokens.flip(0))
    assert (cost.forward_tokens, cost.backward_tokens) == (2 * tokens.numel(), tokens.numel()) and cost.seconds > 0
    gpt2(tokens)
    assert cost.forward_tokens == 2 * tokens.numel()


def test_answered_pairs_are_those_with_the_right_tokens_on_both_sides(embedded: TransformerBridge) -> None:
    pairs = ioi(embedded, 24)
    with torch.no_grad():
        ends = [embedded(side)[:, -1].argmax(-1) for side in (pairs.clean, pairs.corrupt)]
    right = (ends[0] == pairs.target.answer) & (ends[1] == pairs.target.wrong)  # type: ignore[attr-defined]
    assert torch.equal(answered(embedded, pairs), right) and bool(right.any())
    turned = PromptPairs(pairs.corrupt, pairs.clean, pairs.target)
    assert not answered(embedded, turned).any()
    by_function = PromptPairs(pairs.clean, pairs.corrupt, lambda logits: logits[:, -1, 5] - logits[:, -1, 6])
    with torch.no_grad():
        values = [(logits[:, -1, 5] - logits[:, -1, 6]) for logits in (embedded(pairs.clean), embedded(pairs.corrupt))]
    assert torch.equal(answered(embedded, by_function), (values[0] > 0) & (values[1] < 0))
    with pytest.raises(RelevanceError, match="unknown task"):
        answered_pairs(embedded, "ioj")
    with pytest.raises(RelevanceError, match="does not fit this tokenizer"):
        answered_pairs(embedded, "question_answering", 2)


def test_the_command_prints_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, [*COMMAND, "--out", str(tmp_path / "table.csv")])
    assert shown.exit_code == 0, shown.output
    for words in ("2 prompts of the task ioi", "SaCo", "AUPRC", "random from the logits down to here", "random here alone", "embeddings"):
        assert words in shown.output
    assert pd.read_csv(tmp_path / "table.csv")["method"].tolist() == ["attnlrp"]
    (tmp_path / "prompts.txt").write_text("Mary and John went to the store\nJohn gave a drink to\n")
    alone = CliRunner().invoke(app, ["evaluate", "--prompts", str(tmp_path / "prompts.txt"), "--methods", "attnlrp", "--randomised", "0"])
    assert alone.exit_code == 0 and "SaCo" in alone.output and "evidence" not in alone.output
    both = CliRunner().invoke(app, ["evaluate", "--task", "ioi", "--prompts", "x.txt"])
    assert both.exit_code == 2 and "give one of --task, --pairs and --prompts" in both.output


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the trained model ../shared/models/stories260k beside the checkout")
def test_questions_have_one_span_of_evidence(stories: TransformerBridge) -> None:
    """Words of several tokens; the place in the sentence that answers the question is all that differs, and the answer goes with it."""
    pairs, words = answered_pairs(stories, "question_answering", 2, seed=1)
    assert words.startswith("2 prompts of the task question_answering")
    for row in pairs.to_frame(stories).itertuples():
        asked = row.clean.split("Where is ")[1].split("?")[0]
        places = [side.split(f"{asked} is in the ")[1].split(".")[0] for side in (row.clean, row.corrupt)]
        assert row.clean.replace(places[0], places[1]) == row.corrupt and row.clean.count(places[0]) == 1 != row.clean.count(places[1])
        pieces = [row.answer.strip(), row.wrong.strip()]  # the first in which the two places differ
        assert all(piece and piece in place for piece, place in zip(pieces, places, strict=True)) and pieces[0] != pieces[1]
    spans = [row.nonzero().flatten().tolist() for row in evidence_of(pairs)]
    assert all(span[-1] - span[0] < 6 for span in spans)


@pytest.mark.parametrize("method", ["deeplift", "atman", "smoothgrad"])
def test_passes_as_declared_are_those_that_are_counted(embedded: TransformerBridge, method: str) -> None:
    if method == "smoothgrad":
        pytest.importorskip("captum")
    pairs, explain = ioi(embedded, 1), attribution(method)
    explain(embedded, pairs.clean, pairs.target, pairs.clean_mask)  # the first call compares the model with its sites
    with counted(embedded) as cost:
        explain(embedded, pairs.clean, pairs.target, pairs.clean_mask)
    n = pairs.clean.numel()
    forwards, backwards = passes(method, n)
    assert cost.backward_tokens == backwards * n and cost.forward_tokens / n in (forwards, forwards + 1)  # one more reads the embeddings
