"""Functions as targets of data sets: of a batch of rows they give what they give of all, or the run is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import Ablation, score_items
from analyses.datasets.streaming import PairStream
from analyses.evaluation.comparison import compare
from analyses.evaluation.ranking import rank_heads, rank_neurons
from analyses.graph.build import flow_graphs
from analyses.methods import estimator
from analyses.patching import activation_patching
from analyses.perturbation import perturbation_curves
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, logit_diff, propagate
from lens_relevance.inputs import functions
from tests import models
from tests.analyses.streamed_run import told
from tests.analyses.test_streaming import Interruption, Shared, numbers

N = 900  # more than a pass takes
Function = Callable[[Tensor], Tensor]


def closures(answers: Tensor, wrong: Tensor) -> dict[str, Function]:
    """logit_diff(answers, wrong) at the last position, as people write it."""
    rows = torch.arange(len(answers))

    def difference(last: Tensor) -> Tensor:
        n = len(last)
        return last.gather(1, answers[:n, None])[:, 0] - last.gather(1, wrong[:n, None])[:, 0]

    def one_by_one(logits: Tensor) -> Tensor:
        return torch.stack([row[-1, a] - row[-1, b] for row, a, b in zip(logits, answers, wrong)])  # noqa: B905

    return {
        "dies on a slice": lambda logits: logits[rows, -1, answers] - logits[rows, -1, wrong],
        "takes the first answers": lambda logits: difference(logits[:, -1]),
        "row after row": one_by_one,
    }


def pairs_of(n: int, period: int | None = None) -> tuple[PromptPairs, dict[str, Function]]:
    """Pairs with one answer per row as data, and the same as functions. period: after how many rows the answers repeat."""
    clean = models.random_tokens(n, 6, seed=1)
    corrupt = clean.clone()
    corrupt[:, 2:4] = models.random_tokens(n, 2, seed=2)
    answers = models.random_tokens(n, 1, seed=3)[:, 0]
    answers = answers if period is None else answers[torch.arange(n) % period]
    wrong = (answers + 7) % models.VOCAB_SIZE
    return PromptPairs(clean, corrupt, logit_diff(answers, wrong)), closures(answers, wrong)


def with_target(pairs: PromptPairs, function: Function) -> PromptPairs:
    return PromptPairs(pairs.clean, pairs.corrupt, function)


@pytest.mark.parametrize("form", list(closures(torch.tensor([0]), torch.tensor([1]))))
def test_rankings_of_many_pairs_are_those_of_the_same_target_as_data(gpt2: TransformerBridge, form: str) -> None:
    n = N if form != "row after row" else 350  # which is slow
    pairs, forms = pairs_of(n)
    by_function = with_target(pairs, forms[form])
    heads, neurons = rankings_of_the_target_as_data(n)
    pd.testing.assert_frame_equal(rank_heads(gpt2, by_function), heads, check_exact=True)
    pd.testing.assert_frame_equal(rank_neurons(gpt2, by_function[300:340], batch_size=7), neurons, check_exact=True)


@cache
def rankings_of_the_target_as_data(n: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    pairs, _ = pairs_of(n)
    return rank_heads(models.build_gpt2(), pairs), rank_neurons(models.build_gpt2(), pairs[300:340], batch_size=7)


def test_estimates_and_effects_of_many_pairs_are_those_of_the_same_target_as_data(gpt2: TransformerBridge) -> None:
    pairs, forms = pairs_of(N)
    by_function = with_target(pairs, forms["takes the first answers"])
    batches = [PairStream(gpt2, p, 341) for p in (by_function, pairs)]
    steps = [lambda batch: estimator("deeplift")(gpt2, batch, ["resid", "heads"]) for _ in batches]
    estimates = [stream.collect("", step, "")[0] for stream, step in zip(batches, steps, strict=True)]
    assert all(torch.equal(estimates[0][name], estimates[1][name]) and len(estimates[0][name]) == N for name in ("resid", "heads"))


def test_a_comparison_of_many_pairs_is_that_of_the_same_target_as_data(gpt2: TransformerBridge) -> None:
    pairs, forms = pairs_of(60)
    by_function = with_target(pairs, forms["takes the first answers"])
    found = [compare(gpt2, p, ["deeplift", "relp"], components=["resid", "heads"], resamples=0, batch_size=8) for p in (by_function, pairs)]
    assert found[0].table["completeness"][0] < 1e-5
    columns = ["method", "component", "pearson", "completeness"]
    pd.testing.assert_frame_equal(found[0].table[columns], found[1].table[columns], rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4, 6, 8])
def test_answers_that_repeat_with_the_batches(gpt2: TransformerBridge, size: int) -> None:
    """Some batches, and not others, begin where the answers begin anew."""
    pairs, forms = pairs_of(24, period=8)
    by_function = with_target(pairs, forms["takes the first answers"])
    pd.testing.assert_frame_equal(rank_heads(gpt2, by_function, batch_size=size), rank_heads(gpt2, pairs, batch_size=size))


def test_rows_that_were_chosen_by_number(gpt2: TransformerBridge) -> None:
    pairs, forms = pairs_of(20)
    chosen = [17, 3, 8]
    logits = gpt2(pairs.clean[chosen]).detach()
    for form in forms.values():
        some = with_target(pairs, form)[5:][[12, 0, 3]]
        assert torch.equal(some.clean, pairs.clean[[17, 5, 8]])
        for again in (with_target(pairs, form)[chosen], with_target(pairs, form)[2:][[15, 1, 6]]):
            assert torch.equal(again.metric(gpt2)(logits), pairs[chosen].metric(gpt2)(logits))


def test_patching_circuits_graphs_and_curves(gpt2: TransformerBridge) -> None:
    pairs, forms = pairs_of(20)
    by_function = with_target(pairs, forms["takes the first answers"])
    effects = [activation_patching(gpt2, p, ["z"], batch_size=3).effect for p in (by_function, pairs)]
    torch.testing.assert_close(*effects, rtol=0, atol=1e-5)
    for level in ("node", "edge"):
        ablations = [Ablation(gpt2, p, level) for p in (by_function, pairs)]  # type: ignore[arg-type]
        torch.testing.assert_close(ablations[0].full, ablations[1].full, rtol=0, atol=1e-5)
        scores = [torch.from_numpy(score_items(ablation).signed) for ablation in ablations]
        torch.testing.assert_close(*scores, rtol=0, atol=1e-5)
    graphs = [flow_graphs(gpt2, pairs.clean[:3], p[:3].target, reference=pairs.corrupt[:3]) for p in (by_function, pairs)]
    assert all(one == other for one, other in zip(*graphs, strict=True))
    # removals repeat a row many times in a batch
    curves = [perturbation_curves(gpt2, pairs.clean[:4], p[:4].target, methods=["attnlrp"], batch_size=9) for p in (by_function, pairs)]
    pd.testing.assert_frame_equal(*curves, rtol=1e-5, atol=1e-6)


def test_functions_whose_rows_stand_alone_are_given_the_batch_as_it_is(gpt2: TransformerBridge) -> None:
    pairs, _ = pairs_of(20)
    seen: list[Tensor] = []

    def function(logits: Tensor) -> Tensor:
        seen.append(logits[:, -1])
        return seen[-1][:, 3].exp() - logits[:, 2].logsumexp(-1)

    rank_heads(gpt2, with_target(pairs, function), "gradient", batch_size=8)
    on_graph = [logits for logits in seen if logits.requires_grad]
    assert [len(logits) for logits in on_graph] == [8, 8, 4] and not any(bool(logits.isnan().any()) for logits in seen)


def test_one_number_for_all_rows_or_rows_that_look_at_each_other_need_one_batch(gpt2: TransformerBridge) -> None:
    pairs, _ = pairs_of(20)

    def against_the_mean(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 3].mean()

    for function, said in ((lambda logits: logits[:, -1, 3].mean(), "one number for all pairs"), (against_the_mean, "other rows")):
        by_function = with_target(pairs, function)
        assert len(rank_heads(gpt2, by_function))
        with pytest.raises(RelevanceError, match=said):
            rank_heads(gpt2, by_function, batch_size=8)
        with pytest.raises(RelevanceError, match=said):
            propagate(gpt2, pairs.clean[:4], by_function[:4].target)
        torch.testing.assert_close(
            activation_patching(gpt2, by_function, "z", batch_size=8).clean.sum(), function(gpt2(pairs.clean)).sum().detach()
        )


def test_discrete_values_are_those_of_their_own_rows(gpt2: TransformerBridge) -> None:
    """Whether an answer is the top prediction: on random logits it never is, whichever row's answer is asked for."""
    pairs, _ = pairs_of(20)
    top = gpt2(pairs.clean)[:, -1].argmax(-1)
    right = with_target(pairs, lambda logits: (logits[:, -1].argmax(-1) == top[: len(logits)]).float())
    for rows in (slice(0, 3), slice(3, 9), slice(19, 20)):
        batch = right[rows]
        assert bool((batch.metric(gpt2)(gpt2(batch.clean)) == 1).all())


def test_what_would_not_fit_is_refused(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, forms = pairs_of(N)
    monkeypatch.setattr(functions, "_free_bytes", lambda device: 60_000)
    for form in forms.values():
        with pytest.raises(RelevanceError, match=r"logits of all 900 rows .* GiB: give logit"):
            rank_heads(gpt2, with_target(pairs, form))
    # what stands alone takes no memory, unless it computes with all logits
    few, _ = pairs_of(6)
    assert len(rank_heads(gpt2, with_target(pairs, lambda logits: logits[:, -1, 3])[:6]))
    with pytest.raises(RelevanceError, match="GiB"):
        rank_heads(gpt2, with_target(pairs, lambda logits: logits.log_softmax(-1)[:, -1, 3])[:6])
    assert len(rank_heads(gpt2, with_target(few, lambda logits: logits.log_softmax(-1)[:, -1, 3]), batch_size=4))


def test_a_function_of_other_rows_than_are_there_is_refused(gpt2: TransformerBridge) -> None:
    pairs, forms = pairs_of(6)
    by_function = with_target(pairs, forms["dies on a slice"])
    with pytest.raises(RelevanceError, match=r"target of 6 row\(s\), and there are 4"):
        propagate(gpt2, pairs.clean[:4], by_function.target)
    with pytest.raises(RelevanceError, match=r"target of 3 row\(s\), and there are 6"):
        PromptPairs(pairs.clean, pairs.corrupt, by_function[:3].target)
    with pytest.raises(RelevanceError, match="fails on logits .* of the 4 rows"):
        propagate(gpt2, pairs.clean[:2], with_target(pairs[:4], forms["dies on a slice"])[:2].target)


def test_an_interrupted_run_and_several_processes(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pairs, forms = pairs_of(23)
    by_function = with_target(pairs, forms["takes the first answers"])
    alone = rank_heads(gpt2, pairs, "relp", batch_size=2)
    batches: list[int] = []

    def stop(batch: PromptPairs) -> None:
        batches.append(len(batch))
        if len(batches) == 4:
            raise Interruption

    with pytest.raises(Interruption):
        rank_heads(gpt2, by_function, told(stop), batch_size=2, checkpoint=tmp_path)
    resumed = rank_heads(gpt2, by_function, told(lambda batch: batches.append(len(batch))), batch_size=2, checkpoint=tmp_path)
    assert sum(batches) == 23 + 2
    pd.testing.assert_frame_equal(resumed, alone, check_exact=True)
    with monkeypatch.context() as context:
        shared = Shared(context, 2)(lambda: rank_heads(gpt2, by_function, "relp", batch_size=2))
    for frame in shared:
        torch.testing.assert_close(numbers(frame), numbers(alone), rtol=1e-6, atol=1e-6)


def test_one_number_for_all_pairs_is_compared_as_one(gpt2: TransformerBridge) -> None:
    """The mean over pairs of a target has the mean of its effects, and of its estimates, not a mean of parts of them."""
    pairs, forms = pairs_of(12)
    mean = with_target(pairs, lambda logits: forms["dies on a slice"](logits).mean())
    one, many = (compare(gpt2, p, ["deeplift", "relp"], components=["resid", "heads"], resamples=0) for p in (mean, pairs))
    columns = ["method", "component", "pearson", "magnitude_error", "completeness"]
    pd.testing.assert_frame_equal(one.table[columns], many.table[columns], rtol=1e-4, atol=1e-5)
    per_pair = ["top_frequency", "q_value"]  # of one number, which pairs cannot be drawn again for
    assert one.scores[per_pair].isna().all(axis=None) and many.scores[per_pair].notna().any().all()
    pd.testing.assert_frame_equal(one.scores.drop(columns=per_pair), many.scores.drop(columns=per_pair), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [models.build_gpt2, models.build_llama, models.build_gemma2])
def test_relevance_that_does_not_add_up_is_said(build: Callable[[], TransformerBridge]) -> None:
    """A target with kinks, which no quadrature meets, stands for everything that could break completeness."""
    model, (pairs, _) = build(), pairs_of(12)
    kinks = with_target(pairs, lambda logits: logits[:, -1, 3].sin().mul(40).round().div(40) + logits[:, -1, 3].clamp(-0.3, 0.3))
    for function in (
        lambda p: rank_heads(model, p, batch_size=5),
        lambda p: compare(model, p, ["deeplift"], components=["heads"], resamples=0),
    ):
        with pytest.warns(UserWarning, match="relevance misses the difference"):
            function(kinks)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            function(pairs)
