"""Models that tests share: handed out again as they were built, or not at all."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from analyses.benchmarks.tiny_models import FAMILIES, Family
from lens_relevance import coverage, declare_sites, engine, logit, propagate, token_relevance
from lens_relevance.hooked_model import modules_of, root
from lens_relevance.sites import linear
from tests.dictionaries.random_dictionaries import random_dictionary
from tests.precision import no_upcasts
from tests.shared_models import SharedModels, _memories, state_of

TOKENS = torch.tensor([[1, 2, 3, 4]])
UNSHARED: Any = Family.build.__wrapped__  # type: ignore[attr-defined]


@pytest.fixture
def shared() -> Iterator[SharedModels]:
    """Its own: what these tests do to models stays between them."""
    shared = SharedModels(UNSHARED)
    shared.is_open = True
    yield shared


def build(shared: SharedModels, **settings: object) -> TransformerBridge:
    return shared.build(FAMILIES["gpt2"], torch.float32, **settings)


def handed_out_again(shared: SharedModels, use: Callable[[TransformerBridge], Any]) -> bool:
    model = build(shared)
    kept, number = use(model), id(model)
    del model
    shared.models.take_back()
    again = build(shared)
    del kept
    return id(again) == number


@pytest.mark.parametrize(
    "use",
    [
        lambda model: None,
        lambda model: model(TOKENS),
        lambda model: model.run_with_cache(TOKENS)[0],
        lambda model: model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.hook_in", lambda x, hook: 2 * x)]),
        lambda model: model.run_with_hooks(TOKENS, bwd_hooks=[("blocks.0.hook_in", lambda x, hook: None)]),
        lambda model: propagate(model, TOKENS, logit(3), audit=True),
        lambda model: model.train() and model.eval() and None,
    ],
    ids=["nothing", "forward", "cache", "hooks", "backward hooks", "propagate", "train and eval"],
)
def test_a_model_that_is_as_it_was_built_is_handed_out_again(shared: SharedModels, use: Callable[[TransformerBridge], Any]) -> None:
    assert handed_out_again(shared, use)


def data(model: TransformerBridge) -> None:
    """Past autograd's count of changes."""
    model.blocks[0].mlp.out.weight.data[0, 0] += 1e-6


def weight(model: TransformerBridge) -> None:
    with torch.no_grad():
        model.ln_final.weight[0] = 2.0


def another_parameter(model: TransformerBridge) -> None:
    norm = model.ln_final.original_component
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone())


def forward(model: TransformerBridge) -> None:
    module = model.blocks[1].mlp.original_component
    module.forward = module.forward


CHANGES: dict[str, Callable[[TransformerBridge], Any]] = {
    "a weight": weight,
    "a weight, by .data": data,
    "another parameter with the same values": another_parameter,
    "a buffer": lambda model: model.register_buffer("more", torch.zeros(1)),
    "requires_grad": lambda model: setattr(model.ln_final.weight, "requires_grad", False),
    "a gradient": lambda model: model(TOKENS).sum().backward(),
    "a hook of a HookPoint": lambda model: model.blocks[0].hook_in.add_hook(lambda x, hook: x) and None,
    "a backward hook": lambda model: model.blocks[0].hook_in.add_hook(lambda x, hook: None, dir="bwd") and None,
    "a permanent hook": lambda model: model.add_perma_hook("blocks.0.hook_in", lambda x, hook: x) and None,
    "a hook of a module": lambda model: model.original_model.register_forward_hook(lambda *_: None) and None,
    "train mode": lambda model: model.train() and None,
    "train mode of a part": lambda model: model.blocks[1].train() and None,
    "the bridge's config": lambda model: setattr(model.cfg, "eps", 1e-3),
    "a flag of the bridge's config": lambda model: model.set_use_attn_result(True),
    "Hugging Face's config": lambda model: setattr(model.original_model.config, "layer_norm_epsilon", 1e-3),
    "the generation config": lambda model: setattr(model.original_model.generation_config, "max_length", 3),
    "an attribute": lambda model: setattr(model.blocks[0].attn, "mine", 1),
    "a function": forward,
    "a module's class": lambda model: setattr(model.blocks[0].hook_in, "__class__", type("Mine", (type(model.blocks[0].hook_in),), {})),
    "a module": lambda model: setattr(model.original_model, "more", torch.nn.Identity()),
    "the dtype": lambda model: model.to(torch.float64) and None,
    "a tokenizer": lambda model: setattr(model, "tokenizer", object()),
    "compatibility mode": lambda model: model.enable_compatibility_mode(disable_warnings=True),
    "the model is kept": lambda model: model,
    "the model is kept by a function": lambda model: lambda: model,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_was_changed_or_is_held_is_not(shared: SharedModels, change: Callable[[TransformerBridge], Any]) -> None:
    assert not handed_out_again(shared, change)


def test_a_class_that_a_test_puts_in_the_place_of_a_librarys(shared: SharedModels) -> None:
    class OtherMLP(GPT2MLP):
        pass

    def kind() -> type[Any]:
        model = build(shared)
        found = type(model.original_model.transformer.h[0].mlp.original_component)
        del model
        shared.models.take_back()
        return found

    assert kind() is GPT2MLP
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gpt2, "GPT2MLP", OtherMLP)
        assert kind() is OtherMLP
    assert kind() is GPT2MLP


def test_what_is_handed_out_again_is_as_if_it_were_new(shared: SharedModels) -> None:
    """All values, and nothing that the packages have noted of it: declared sites, that it was compared, how much memory it takes."""
    fresh = [each for each in state_of(UNSHARED(FAMILIES["gpt2"], torch.float32)) if isinstance(each, torch.Tensor)]
    model = build(shared)
    declare_sites(model, [*linear("mine", "blocks.0.mlp.hook_in", "blocks.0.mlp.hook_pre", weight=torch.zeros(64, 16), bias=None)])
    engine.CHECKED._as[model] = 1
    number = id(model)
    del model
    shared.models.take_back()
    again = build(shared)
    assert id(again) == number
    noted = {module for memory in _memories(0) for module in memory}
    assert not noted & set(modules_of(again, root(again)))
    values = [each for each in state_of(again) if isinstance(each, torch.Tensor)]
    assert len(values) == len(fresh) > 50 and all(torch.equal(a, b) for a, b in zip(values, fresh, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "t5", "deepseek_v3", "vit", "native"])
def test_a_model_is_what_the_library_builds(family: str) -> None:
    """Though it does not look through all that it looks through by itself."""
    made = UNSHARED(FAMILIES[family])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerBridge, "__init__", TransformerBridge.__init__.__wrapped__)  # type: ignore[attr-defined]
        fresh = UNSHARED(FAMILIES[family])
    assert {name: point.name for name, point in made.hook_dict.items()} == {name: point.name for name, point in fresh.hook_dict.items()}
    assert list(made.hook_dict) == list(fresh.hook_dict) and len(fresh.hook_dict) > 50
    one, two = ([(type(m), list(vars(m)), m.training) for m in modules_of(model, root(model))] for model in (made, fresh))
    assert one == two and not any(training for *_, training in one)


def test_no_model_is_two_models(shared: SharedModels) -> None:
    """Within a test, with other settings, and where it is built for several tests or in a context that changes what is computed."""
    first = build(shared)
    assert build(shared) is not first
    numbers = {id(first)}
    del first
    shared.models.take_back()
    assert id(build(shared, seed=1)) not in numbers and build(shared, n_layers=1).cfg.n_layers == 1
    with no_upcasts():
        assert id(build(shared)) not in numbers
    shared.is_open = False
    assert id(build(shared)) not in numbers
    shared.is_open = True
    assert id(build(shared)) in numbers


def test_building_draws_no_random_numbers(shared: SharedModels) -> None:
    """Or what a test draws would depend on whether its model was built."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    shared.build(FAMILIES["native"])
    assert torch.equal(torch.get_rng_state(), before)


def with_dictionaries(model: TransformerBridge) -> Any:
    transcoder = random_dictionary("blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out", d_in=16)
    return propagate(model, TOKENS, logit(3), dictionaries=[transcoder])


@pytest.mark.parametrize(
    "use",
    [
        lambda model: propagate(model, TOKENS, logit(3), audit=True),
        lambda model: propagate(model, TOKENS, logit(3), recompute=True),
        lambda model: token_relevance(model, TOKENS, logit(3), method="chefer_2021a"),
        with_dictionaries,
        coverage,
    ],
    ids=["propagate", "block by block", "token relevance", "dictionaries", "coverage"],
)
def test_no_reference_cycle_of_ours_holds_a_model(shared: SharedModels, use: Callable[[TransformerBridge], Any]) -> None:
    """Or its memory would not be free when a user drops it, but when Python looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        model = build(shared)
        use(model)
        del model
        built = shared.models.in_use[0]
        references = sys.getrefcount(built.model)
        assert references == built.held_by
    finally:
        gc.enable()
