"""Random weights while a block lasts: what is drawn, that all else stays, and that the model is what it was afterwards."""

from __future__ import annotations

import _thread
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from analyses.evaluation.randomised_relevance import stages
from analyses.evaluation.randomised_weights import randomised_weights, weight_parts
from lens_relevance import RelevanceError
from lens_relevance.hooked_model import parameters_of, root
from tests.models import build_gpt2, build_llama, build_neox

BUILDERS: tuple[Callable[[], TransformerBridge], ...] = (build_gpt2, build_llama, lambda: build_neox(parallel=True))


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """A process that was started in the background of a script ignores SIGINT."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


def weights_of(model: TransformerBridge) -> list[nn.Parameter]:
    return parameters_of(model, root(model))


def copies(model: TransformerBridge) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in weights_of(model)]


def same(model: TransformerBridge, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(parameter, values) for parameter, values in zip(weights_of(model), before, strict=True))


@pytest.mark.parametrize("build", BUILDERS)
def test_the_parts_are_all_parameters_each_once_from_the_logits_down(build: Callable[[], TransformerBridge]) -> None:
    model = build()
    parts = weight_parts(model)
    assert list(parts) == ["output", "layer 1", "layer 0", "embeddings"]
    found = [id(parameter) for part in parts.values() for parameter in part]
    assert len(found) == len(set(found)) and set(found) == {id(parameter) for parameter in weights_of(model)}
    assert {id(p) for p in parts["layer 1"]} >= {id(p) for p in model.blocks[1].parameters()}
    assert id(model.embed.original_component.weight) in {id(p) for p in parts["embeddings"]}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("part", ["output", "layer 1", "embeddings"])
def test_a_part_is_drawn_anew_and_put_back_bit_for_bit(build: Callable[[], TransformerBridge], part: str, tokens: torch.Tensor) -> None:
    model = build()
    with torch.no_grad():
        for parameter in weights_of(model):  # biases of 0 and scales of 1 are what training leaves only by chance
            parameter.add_(0.1 * torch.randn_like(parameter))
    before, flags, logits = copies(model), [parameter.requires_grad for parameter in weights_of(model)], model(tokens).detach()
    parts = weight_parts(model)
    inside = {id(parameter) for parameter in parts[part]}
    with randomised_weights({part: parts[part]}, seed=5):
        for parameter, values in zip(weights_of(model), before, strict=True):
            assert bool((parameter != values).all()) if id(parameter) in inside else torch.equal(parameter, values)
            if id(parameter) in inside and parameter.numel() > 500:
                new, error = parameter.detach(), float(values.std()) / values.numel() ** 0.5
                assert float(new.mean() - values.mean()) == pytest.approx(0, abs=5 * error)
                assert float(new.std() / values.std()) == pytest.approx(1, abs=0.15)
        assert not torch.allclose(model(tokens), logits, atol=1e-3)
        drawn = copies(model)
    assert same(model, before) and torch.equal(model(tokens), logits)
    assert [parameter.requires_grad for parameter in weights_of(model)] == flags
    with randomised_weights({"layer 0": parts["layer 0"], part: parts[part]}, seed=5):
        again = dict(zip(map(id, weights_of(model)), copies(model), strict=True))
    at = [id(parameter) for parameter in weights_of(model)]
    assert all(torch.equal(again[name], values) for name, values in zip(at, drawn, strict=True) if name in inside)


def test_an_interrupt_leaves_the_weights_as_they_were(gpt2: TransformerBridge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C inside the block, and at each tensor that is drawn or put back."""
    before, parts = copies(gpt2), weight_parts(gpt2)
    with pytest.raises(KeyboardInterrupt), randomised_weights(parts):
        assert not same(gpt2, before)
        _thread.interrupt_main()
        for _ in range(10**7):
            pass
    assert same(gpt2, before)
    for name in ("normal_", "copy_"):
        original, calls = getattr(torch.Tensor, name), []

        def interrupted(self: torch.Tensor, *args: Any, original: Any = original, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls.append(len(calls))
            if len(calls) == 3:
                _thread.interrupt_main()
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, name, interrupted)
            with pytest.raises(KeyboardInterrupt), randomised_weights(parts):
                for _ in range(10**7):
                    pass
        assert len(calls) > 3 and same(gpt2, before)
    with pytest.raises(ZeroDivisionError), randomised_weights(parts):
        _ = 1 / 0
    assert same(gpt2, before)


def test_what_cannot_be_random_is_refused(gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="offloaded"), randomised_weights({"layer 0": [nn.Parameter(torch.empty(3, device="meta"))]}):
        pass
    with pytest.raises(RelevanceError, match="no weights"), randomised_weights({"layer 0": []}):
        pass


def test_stages_go_down_from_the_logits_and_then_part_by_part(gpt2: TransformerBridge) -> None:
    parts = {name: [nn.Parameter(torch.randn(2))] for name in ("output", *(f"layer {i}" for i in reversed(range(10))), "embeddings")}
    found = stages(parts)
    looked_at = ["output", "layer 9", "layer 5", "layer 0", "embeddings"]
    expected = [*(("cascading", part) for part in looked_at), *(("independent", part) for part in looked_at[1:])]
    assert [(kind, part) for kind, part, _ in found] == expected
    assert [len(random) for _, _, random in found] == [1, 2, 6, 11, 12] + [1] * 4
    assert list(found[1][2]) == ["output", "layer 9"] and list(found[7][2]) == ["layer 0"]
    without = [part for _, part, _ in stages({**parts, "output": []})]  # a tied head and no norm before it
    assert without == [*looked_at[1:], *looked_at[2:]]
