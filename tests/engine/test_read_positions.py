"""Logits at the positions that a target reads: the same numbers as with all logits, and nothing else computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_relevance import (
    RelevanceError,
    continuation,
    latent,
    log_prob,
    logit,
    logit_diff,
    mean_embedding,
    propagate,
    random_tokens,
)
from lens_relevance.inputs.functions import FunctionMetric
from lens_relevance.inputs.targets import as_target
from lens_relevance.sites import anatomy
from tests.encoder_decoders import ENCODER_DECODERS, build_encoder_decoder, sources_and_targets
from tests.engine.families import FAMILIES, TARGET, build, close, inputs_and_reference, reference_for, unexplained
from tests.models import build_gpt2
from tests.wider_models import WIDER, build_wider

TOKENS, OTHER = inputs_and_reference()
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def widths(model: Any) -> list[int]:
    """Notes how many positions the unembedding computes, forward after forward."""
    seen: list[int] = []
    module = model.unembed.original_component
    plain = type(module).forward

    def forward(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return plain(module, x)

    module.forward = forward
    return seen


def both(model: Any, inputs: Any, target: Any, **options: Any) -> tuple[Any, Any]:
    """The run as it is, and with the logits of all positions; of all points of the default and of the account."""
    asked = {name for roles in anatomy(model).stacks.roles.values() for names in roles.values() for name in names}
    few = propagate(model, inputs, target, names_filter=lambda name: name in asked, **options)
    everything = propagate(model, inputs, target, names_filter=lambda name: name in asked | {"unembed.hook_out"}, **options)
    return few, everything


def same(few: Any, everything: Any, tolerance: float) -> None:
    """The caches of `both` agree, and not on zeros."""
    at = few.logit_positions
    assert few.logits.shape[:2] == at.shape and everything.logits.shape[1] > at.shape[1]
    close(few.logits, everything.logits[torch.arange(len(at)).unsqueeze(1), at], tolerance)
    close(few.value, everything.value, tolerance)
    if everything.reference_value is not None:
        close(few.reference_value, everything.reference_value, tolerance)
    assert set(everything) - set(few) <= {"unembed.hook_out"} and len(few) > 3
    for name in few:
        for one, other in ((few.coefficients[name], everything.coefficients[name]), (few[name], everything[name])):
            if bool(other.any()):  # positions do not differ between two runs
                close(one, other, tolerance)
            else:
                assert not bool(one.any())
    assert sum(bool((few[name] != 0).any()) for name in few) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_ruleset_gives_what_it_gives_with_all_logits(family: str) -> None:
    model = build(family)
    seen = widths(model)
    for rules in ("attnlrp", "deeplift"):
        few, everything = both(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=True)
        same(few, everything, 1e-5 if family in ("llama", "qwen3", "gemma2", "olmo2") else 1e-12)  # computed in float32 in part
        assert max(unexplained(few), unexplained(everything)) < 1e-5
        columns = few.conservation().columns.drop(["example", "layer"])
        accounts = [torch.tensor(cache.conservation()[columns].to_numpy(float)) for cache in (few, everything)]
        close(accounts[0], accounts[1], 1e-5)
    assert set(seen) == {1, 6} and seen.count(1) == seen.count(6)


@pytest.mark.parametrize("family", [*WIDER, *ENCODER_DECODERS])
def test_other_families(family: str) -> None:
    """BERT reads a position in the middle, where a token is masked."""
    if family in WIDER:
        model, inputs, other = build_wider(family), TOKENS, OTHER
    else:
        model, (inputs, other) = build_encoder_decoder(family), sources_and_targets()  # type: ignore[assignment]
    target = logit_diff(7, 11, position=2)
    for rules in ("attnlrp", "deeplift"):
        few, everything = both(model, inputs, target, rules=rules, reference=other if rules == "deeplift" else None, audit=True)
        same(few, everything, 1e-5)
        assert few.logit_positions.tolist() == [[2], [2]]


@pytest.mark.parametrize("mask", [MASK, MASK.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize(
    ("target", "width"),
    [
        (log_prob(5), 1),
        (logit([5, 6], position=1), 1),
        (continuation([3, 4, 5]), 3),
        (lambda logits: logits[:, -1, 3] - logits[:, -2].logsumexp(-1), 2),
        (lambda logits: logits[torch.arange(2), [3, 5], torch.tensor([7, 8])].sum(), 2),
    ],
    ids=["log_prob", "second token", "continuation", "function", "function of other positions by row"],
)
def test_targets_batches_and_padding(target: Any, width: int, mask: Tensor) -> None:
    model = build_gpt2()
    for rules in ("attnlrp", "deeplift"):
        few, everything = both(model, TOKENS, target, rules=rules, reference=reference_for(rules, OTHER), attention_mask=mask)
        same(few, everything, 1e-5)
        assert few.logits.shape[1] == width


@pytest.mark.parametrize("reference", [random_tokens(3), mean_embedding()], ids=["random_tokens", "mean_embedding"])
def test_several_references(reference: Any) -> None:
    model = build("gpt2")
    for target in (logit_diff([7, 8], [1, 2]), None, lambda logits: logits[:, -1, 3] - logits[:, -1, 4]):
        few, everything = both(model, TOKENS, target, rules="deeplift", reference=reference, attention_mask=None, audit=True)
        same(few, everything, 1e-12)


def test_a_latent_and_the_top_prediction_have_the_last_logits_alone() -> None:
    model = build_gpt2()
    seen = widths(model)
    for target in (None, latent("blocks.1.hook_resid_pre", unit=3, position=2)):
        few, everything = both(model, TOKENS, target, rules="attnlrp", attention_mask=MASK)
        same(few, everything, 1e-5)
        assert few.logit_positions.tolist() == [[3], [5]]
    assert seen == [1, 6, 1, 6]


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        (lambda logits: logits[:, -1, 3] - logits[:, -1, 4], [5]),
        (lambda logits: logits[..., -1, :].log_softmax(-1)[:, 3], [5]),
        (lambda logits: logits[torch.arange(len(logits)), -2, torch.tensor([3, 4])], [4]),
        (lambda logits: logits[:, [0, -1], 3].mean(1), [0, 5]),
        (lambda logits: logits[:, 2:4].exp().mean((1, 2)), [2, 3]),
        (lambda logits: logits[1, torch.tensor(3)].sum(), [3]),
        (lambda logits: logits[torch.tensor([True, False]), -1, 3].sum(), [5]),
        (lambda logits: logits[torch.arange(logits.shape[0], device=logits.device), logits.size(1) - 1].std(-1), [5]),
        # whatever else a function does needs all logits
        (lambda logits: logits.log_softmax(-1)[:, -1, 3], None),
        (lambda logits: logits[:, :, 3].mean(1), None),
        (lambda logits: torch.stack([row[-1, 3] for row in logits]), None),
        (lambda logits: (logits * 2)[:, -1, 3], None),
        (lambda logits: torch.logsumexp(logits, -1)[:, -1], None),
        (lambda logits: logits[:, -1, 3] + logits.mean((1, 2)), None),
        (lambda logits: logits[:, ::5, 3].mean(1), None),
        (lambda logits: logits[torch.ones(2, 6, dtype=torch.bool)].sum(), None),
        (lambda logits: logits[:, None, -1, 3].mean(1), None),
        (lambda logits: logits[0].sum(), None),
    ],
)
def test_the_positions_of_a_function_are_those_that_it_asks_for(function: Callable[[Tensor], Tensor], columns: list[int] | None) -> None:
    model = build("gpt2")
    metric = as_target(function).metric(model, TOKENS)
    assert isinstance(metric, FunctionMetric)
    logits = model(TOKENS)
    if columns is None:
        assert metric.at is None
    else:
        assert metric.at is not None and metric.at.tolist() == [columns] * 2
        assert torch.equal(metric.of_read()(logits[:, columns]), metric(logits))
    few, everything = both(model, TOKENS, function, rules="deeplift", reference=OTHER)
    if columns is not None:
        same(few, everything, 1e-12)
    close(few.value, everything.value, 1e-12)
    close(few.value, function(logits).expand(2), 1e-12)


def test_a_function_that_reads_elsewhere_than_it_did_is_refused() -> None:
    """On random logits one branch was taken; on these the other one is."""
    model = build("gpt2")
    top = float(model(TOKENS).detach()[:, -1, 3].max())

    def moving(logits: Tensor) -> Tensor:
        last = logits[:, -1, 3]
        return last if not bool((last.max() - top).abs() < 1e-9) else logits[:, 2, 3]

    def computing(logits: Tensor) -> Tensor:
        last = logits[:, -1, 3]
        return last if not bool((last.max() - top).abs() < 1e-9) else logits.sum((1, 2))

    with pytest.raises(RelevanceError, match=r"reads positions \[2\] of these logits, and of others \[5\]"):
        propagate(model, TOKENS, moving)
    with pytest.raises(RelevanceError, match="otherwise than by index"):
        propagate(model, TOKENS, computing)


def test_hooks_on_the_unembedding_see_all_positions() -> None:
    model = build("gpt2")
    plain = propagate(model, TOKENS, TARGET, rules="attnlrp")
    shapes: list[torch.Size] = []

    def second_last(x: Tensor, hook: Any) -> Tensor:
        shapes.append(x.shape)
        x = x.clone()
        x[:, 5] = x[:, 4]
        return x

    for name in ("unembed.hook_out", "unembed.hook_in"):
        with model.hooks(fwd_hooks=[(name, second_last)]):
            moved = propagate(model, TOKENS, TARGET, rules="attnlrp")
        close(moved.value, propagate(model, TOKENS, logit_diff(7, 11, position=4), rules="attnlrp").value, 1e-12)
        assert not torch.allclose(moved.value, plain.value)
    assert [shape[1] for shape in shapes] == [6, 6]
    handle = model.unembed.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert propagate(model, TOKENS, TARGET, rules="attnlrp").logits.shape[1] == 6
    handle.remove()
    assert shapes[-1] == (2, 6, 50)


@pytest.mark.parametrize("name", ["unembed.hook_in", "unembed.hook_out"])
def test_what_is_asked_for_at_the_unembedding_has_all_positions(name: str) -> None:
    model = build("gpt2")
    cache = propagate(model, TOKENS, TARGET, rules="attnlrp", names_filter=name)
    assert cache.coefficients[name].shape[:2] == (2, 6) and cache.logits.shape == (2, 6, 50)
    assert cache.logit_positions is not None and cache.logit_positions.tolist() == [list(range(6))] * 2
    assert torch.equal(cache.logits, model(TOKENS).detach())
    close(cache[name].sum((1, 2)), cache.value, 0.1 if name == "unembed.hook_in" else 1e-12)  # less the bias
    through = propagate(model, TOKENS, TARGET, rules="attnlrp", through={"unembed.hook_out": {"position": [5]}})
    close(through.tokens(), propagate(model, TOKENS, TARGET, rules="attnlrp").tokens(), 1e-12)
