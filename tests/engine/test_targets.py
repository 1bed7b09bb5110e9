"""Targets: which scalar is explained, and its exact coefficients between two runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import RelevanceError, continuation, log_prob, logit, logit_diff, propagate
from lens_relevance.inputs.metrics import AtPositions, LogProbs, Metric
from lens_relevance.inputs.token_ids import single_token
from tests.engine.families import build, close, inputs_and_reference


def test_values_are_those_of_the_logits() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    logits = model(tokens)
    close(propagate(model, tokens, logit(5)).value, logits[:, -1, 5], 1e-12)
    close(
        propagate(model, tokens, logit_diff([5, 6], [7, 8], position=2)).value, logits[[0, 1], 2, [5, 6]] - logits[[0, 1], 2, [7, 8]], 1e-12
    )
    close(propagate(model, tokens, log_prob(5, position=-2)).value, logits[:, -2].log_softmax(-1)[:, 5], 1e-12)
    close(propagate(model, tokens, logit([(5, 6), (7, 8)])).value, logits[[0, 1], -1][[[0], [1]], [[5, 6], [7, 8]]].mean(1), 1e-12)


def test_a_target_of_some_rows_is_that_of_these_rows() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference(batch=4)
    targets = [
        logit_diff([5, 6, 7, 8], [9, 10, 11, 12]),
        logit_diff(5, torch.tensor([9, 10, 11, 12])),
        log_prob([5, 6, 7, 8]),
        continuation([[5, 6], [7, 8], [9, 10], [11, 12]]),
        continuation([5, 6]),
    ]
    for target in targets:
        everything = propagate(model, tokens, target).value
        assert len(everything.unique()) == 4
        for rows in (slice(1, 3), [3, 0], torch.tensor([False, True, False, True])):
            close(propagate(model, tokens[rows], target.select(rows)).value, everything[rows], 1e-12)


def test_none_explains_the_top_prediction_against_its_runner_up() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    top = model(tokens)[:, -1].topk(2, -1).values
    close(propagate(model, tokens).value, top[:, 0] - top[:, 1], 1e-12)


def test_positions_count_real_tokens_under_a_mask() -> None:
    model, (tokens, _) = build("gpt2", torch.float32), inputs_and_reference()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    value = propagate(model, tokens, logit(5, position=-1), attention_mask=mask).value
    close(value[:1], model(tokens[:1, :4])[:, -1, 5], 1e-5)
    with pytest.raises(RelevanceError, match="outside the prompt"):
        propagate(model, tokens, logit(5, position=5), attention_mask=mask)


def test_a_continuation_is_the_log_probability_of_its_tokens() -> None:
    model, (tokens, other) = build("gpt2"), inputs_and_reference()
    answer = [3, 4, 5]
    cache = propagate(model, tokens, continuation(answer), reference=other)
    longer = torch.cat([tokens, torch.tensor([answer, answer])], 1)
    log_probs = model(longer).log_softmax(-1)
    expected = sum(log_probs[:, 5 + i, token] for i, token in enumerate(answer))
    assert isinstance(expected, torch.Tensor) and cache.reference_value is not None
    close(cache.value, expected, 1e-10)
    gap = cache.value - cache.reference_value
    close(cache.residual().sum(1), gap.unsqueeze(1).expand(-1, 3), 1e-9)


def test_log_prob_coefficients_are_exact_between_two_logits() -> None:
    """Also where the probabilities of one run underflow, where the plain gradient is worth nothing."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 30.0, 1000.0):
        one, two = (torch.randn(3, 4, 9, dtype=torch.float64, generator=generator) * size for _ in range(2))
        metric = AtPositions(torch.tensor([[0, 2], [1, 3], [3, 1]]), LogProbs(torch.tensor([[1, 2], [3, 3], [8, 0]])))
        coefficients = metric.pair_coefficients(one, two)
        close(((one - two) * coefficients).sum((1, 2)), metric(one) - metric(two), 1e-10)


def test_any_other_function_is_averaged_over_the_straight_path() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    cubic = Metric(lambda logits: logits[:, -1, 0] ** 3 * logits[:, -1, 1])
    close(((one - two) * cubic.pair_coefficients(one, two)).sum((1, 2)), cubic(one) - cubic(two), 1e-12)
    entropy = Metric(lambda logits: -(logits[:, -1].softmax(-1) * logits[:, -1].log_softmax(-1)).sum(-1))
    close(((one - two) * entropy.pair_coefficients(one, two)).sum((1, 2)), entropy(one) - entropy(two), 1e-4)


class Counted(Metric):
    """A metric that counts how often it is evaluated."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(function)
        self.count = 0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().__call__(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_function_linear_in_the_logits_has_the_coefficients_of_the_target_that_it_is(dtype: torch.dtype) -> None:
    """Bit by bit, without walking the path; also a mean over rows, and one with a constant."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(4, 3, 50, dtype=torch.float64, generator=generator).mul(20).to(dtype) for _ in range(2))
    known = logit_diff(5, 7).metric(build("gpt2"), torch.zeros(4, 3, dtype=torch.long))
    for function, factor in (
        (lambda logits: logits[:, -1, 5] - logits[:, -1, 7], 1.0),
        (lambda logits: 3.0 + (logits[:, -1, 5] - logits[:, -1, 7]).mean(), 0.25),
    ):
        metric = Counted(function)
        assert torch.equal(metric.pair_coefficients(one, two), factor * known.pair_coefficients(one, two))
        assert metric.count == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda logits: logits[:, -1, 0].clamp(-1, 1),  # the same gradient, 0, beyond both ends
        lambda logits: logits[:, -1, 0] + logits[:, -1, 0].relu(),
        lambda logits: logits[:, -1, 0] ** 2,
    ],
)
def test_a_function_that_is_not_linear_is_averaged_over_the_path(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    one, two = torch.full((2, 3, 5), 2.0), torch.full((2, 3, 5), -3.0)
    metric = Counted(function)
    coefficients = metric.pair_coefficients(one, two)
    assert metric.count >= 10
    nodes = torch.from_numpy(np.polynomial.legendre.leggauss(8)[0])
    weights = torch.from_numpy(np.polynomial.legendre.leggauss(8)[1])
    line = (-3.0 + (nodes + 1) / 2 * 5).requires_grad_(True)
    values = function(line[:, None, None].expand(-1, 3, 5))
    (slopes,) = torch.autograd.grad(values.sum(), line)
    close(coefficients[:, -1, 0].double(), (weights / 2 * slopes).sum().expand(2), 1e-6)
    assert (
        bool((coefficients[:, :-1] == 0).all()) and bool((coefficients[:, -1, 1:] == 0).all()) and bool((coefficients[:, -1, 0] != 0).all())
    )


def test_what_the_path_average_leaves_is_the_sink_target() -> None:
    model, (tokens, _other) = build("gpt2"), inputs_and_reference()
    cache = propagate(model, tokens, lambda logits: (logits[:, -1, 3] * 2).relu(), rules="attnlrp", audit=True)
    account = cache.conservation()
    assert account["unexplained"].abs().max() < 1e-9
    nonlinear = propagate(model, tokens, lambda logits: logits[:, -1, 3].exp(), rules="attnlrp", audit=True).conservation()
    assert nonlinear["target"].abs().max() > 1e-3 and nonlinear["unexplained"].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (logit(500), "outside the vocabulary"),
        (logit([1, 2, 3]), "one per example"),
        (logit("word"), "no tokenizer"),
        (logit(5, position=9), "outside the prompt"),
        (continuation([]), "empty"),
        (lambda logits: logits, "one value per example"),
        (lambda logits: torch.zeros(2), "does not depend"),
    ],
)
def test_bad_targets_are_refused(target: object, said: str) -> None:
    with pytest.raises(RelevanceError, match=said):
        propagate(build("gpt2"), inputs_and_reference()[0], target, rules="attnlrp")  # type: ignore[arg-type]


def test_a_word_with_its_space_under_a_tokenizer_that_adds_one(stories: TransformerBridge) -> None:
    """Llama's SentencePiece puts a space in front of every text, so that " she" would be read as two tokens."""
    with_space, without = single_token(stories, " she"), single_token(stories, "she")
    assert with_space == without == stories.tokenizer.convert_tokens_to_ids("\u2581she")
    assert len(stories.to_tokens(" she", prepend_bos=False)[0]) == 2
    for refused in (" Mary", " ", "  she"):
        with pytest.raises(RelevanceError, match="tokens"):
            single_token(stories, refused)
