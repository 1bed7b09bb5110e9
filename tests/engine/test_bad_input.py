"""Each bad input is an error that names the thing and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from lens_relevance import (
    RelevanceError,
    attach,
    log_prob,
    logit,
    logit_diff,
    mean_embedding,
    propagate,
    random_tokens,
    register_ruleset,
    rulesets,
    zero_embedding,
)
from lens_relevance.rules import Rule
from tests.engine.families import TARGET, build, inputs_and_reference
from tests.models import build_gpt2, build_llama, build_with_words

TOKENS, OTHER = inputs_and_reference()
Call = Callable[[TransformerBridge], object]

CASES: dict[str, tuple[Call, list[str]]] = {
    "unknown HookPoint, with suggestions": (
        lambda m: propagate(m, TOKENS, TARGET, names_filter="blocks.0.attn.hook_zz"),
        ["blocks.0.attn.hook_zz", "unknown HookPoint"],
    ),
    "HookPoint of another layer": (
        lambda m: propagate(m, TOKENS, TARGET, names_filter=["blocks.7.hook_resid_pre"]),
        ["blocks.7.hook_resid_pre", "blocks.0.hook_resid_pre"],
    ),
    "HookPoint that needs a flag": (
        lambda m: propagate(m, TOKENS, TARGET, names_filter="blocks.0.attn.hook_result"),
        ["blocks.0.attn.hook_result", "set_use_attn_result(True)"],
    ),
    "HookPoint of integers": (lambda m: propagate(m, TOKENS, TARGET, names_filter="embed.hook_in"), ["embed.hook_in", "integers"]),
    "unknown ruleset": (lambda m: propagate(m, TOKENS, TARGET, rules="lrp"), ["'lrp'", "attnlrp", "deeplift", "register_ruleset"]),
    "unknown ruleset in attach": (lambda m: attach(m, "lrp").__enter__(), ["'lrp'", "attnlrp"]),
    "operation of a table": (lambda m: propagate(m, TOKENS, TARGET, rules={"normalization": Rule()}), ["'normalization'", "norm"]),
    "token id outside": (lambda m: propagate(m, TOKENS, logit(50)), ["50", "vocabulary"]),
    "negative token id": (lambda m: propagate(m, TOKENS, logit(-1)), ["-1", "vocabulary"]),
    "tokens for another batch": (lambda m: propagate(m, TOKENS, logit([1, 2, 3])), ["3 given", "2 example"]),
    "text without a tokenizer": (lambda m: propagate(m, "a prompt", TARGET), ["no tokenizer", "token ids"]),
    "word without a tokenizer": (lambda m: propagate(m, TOKENS, logit(" Mary")), ["no tokenizer", "' Mary'"]),
    "position outside": (lambda m: propagate(m, TOKENS, logit(3, position=6)), ["position 6", "[6] real tokens"]),
    "target of another shape": (lambda m: propagate(m, TOKENS, lambda logits: logits[:, -1]), ["scalar", "(2, 50)"]),
    "target that is no tensor": (lambda m: propagate(m, TOKENS, lambda logits: 1.0), ["scalar", "float"]),  # type: ignore[arg-type, return-value]
    "target that ignores the logits": (lambda m: propagate(m, TOKENS, lambda logits: torch.ones(2)), ["does not depend on the logits"]),
    "no tokens": (lambda m: propagate(m, torch.zeros(1, 0, dtype=torch.long), TARGET), ["empty"]),
    "no rows": (lambda m: propagate(m, torch.zeros(0, 4, dtype=torch.long), TARGET), ["empty"]),
    "ids longer than the context": (lambda m: propagate(m, torch.ones(1, 40, dtype=torch.long), TARGET), ["40 tokens", "32"]),
    "ids outside": (lambda m: propagate(m, torch.tensor([[1, 50]]), TARGET), ["0..49", "50"]),
    "ids that are no integers": (lambda m: propagate(m, TOKENS.float(), TARGET), ["integers", "float32"]),
    "mask of another shape": (lambda m: propagate(m, TOKENS, TARGET, attention_mask=torch.ones(2, 5)), ["(2, 5)", "(2, 6)"]),
    "mask that hides a row": (
        lambda m: propagate(m, TOKENS, TARGET, attention_mask=torch.tensor([[1] * 6, [0] * 6])),
        ["hides every token"],
    ),
    "attach deeplift without a reference": (lambda m: attach(m, "deeplift").__enter__(), ["'deeplift'", "reference="]),
    "reference of another length": (lambda m: propagate(m, TOKENS, TARGET, reference=OTHER[:, :5]), ["(2, 5)", "(2, 6)", "same number"]),
    "reference of other rows": (lambda m: propagate(m, TOKENS, TARGET, reference=OTHER[:1]), ["(1, 6)", "(2, 6)"]),
    "reference of another width": (lambda m: propagate(m, TOKENS, TARGET, reference=torch.randn(2, 6, 17)), ["17", "16"]),
    "no references": (lambda m: propagate(m, TOKENS, TARGET, reference=random_tokens(0)), ["at least one"]),
    "reference ids outside": (lambda m: propagate(m, TOKENS, TARGET, reference=OTHER + 50), ["0..49"]),
    "train mode": (lambda m: propagate(m.train(), TOKENS, TARGET), ["train mode", "model.eval()"]),
    "train mode in attach": (lambda m: attach(m.train(), "attnlrp").__enter__(), ["train mode", "model.eval()"]),
    "something else than a bridge": (lambda m: propagate(m.original_model, TOKENS, TARGET), ["TransformerBridge"]),
}


@pytest.mark.parametrize("case", list(CASES))
def test_bad_input(case: str) -> None:
    model = build_gpt2()
    call, words = CASES[case]
    with pytest.raises(RelevanceError) as caught:
        call(model)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    assert isinstance(caught.value, ValueError)


def test_one_module_in_train_mode_is_named() -> None:
    model = build_gpt2()
    model.blocks[1].ln2.train()
    with pytest.raises(RelevanceError, match=r"blocks\.1\..*ln_?2"):
        propagate(model, TOKENS, TARGET)


def test_train_mode_switched_on_inside_attach() -> None:
    model = build_gpt2()
    with attach(model, "attnlrp"):
        model.train()
        with pytest.raises(RelevanceError, match="train mode"):
            model(TOKENS)


@pytest.mark.parametrize("builder", [build_gpt2, build_llama])
def test_a_kv_cache_is_refused(builder: Callable[[], TransformerBridge]) -> None:
    model = builder()
    past = DynamicCache(config=model.original_model.config)
    with torch.no_grad():
        model.original_model(TOKENS, past_key_values=past, use_cache=True)
    with attach(model, "attnlrp"):
        with pytest.raises(RelevanceError, match="past_key_values"):
            model(TOKENS[:, :1], past_key_values=past)
        assert model(TOKENS).shape == (2, 6, 50)  # the model's own fresh cache is no obstacle


def test_processed_weights_are_allowed_with_a_warning() -> None:
    model = build_gpt2()
    model.enable_compatibility_mode()
    with pytest.warns(UserWarning, match="processed"):
        cache = propagate(model, TOKENS, TARGET)
    assert cache.tokens().abs().max() > 0


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> TransformerBridge:
    return build_with_words(Path(tmp_path_factory.mktemp("wordy")), ["Mary", "John", "went", "home"])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: logit(" Mary John"), ["' Mary John'", "' Mary'", "' John'", "2 tokens"]),
        (lambda: logit_diff(" Mary", " John went"), ["wrong answer", "' John'", "' went'"]),
        (lambda: log_prob(" Bob"), ["' Bob'", "not in the vocabulary"]),
        (lambda: logit(""), ["''", "0 tokens"]),
    ],
)
def test_words_must_be_one_token(wordy: TransformerBridge, make: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(RelevanceError) as caught:
        propagate(wordy, " Mary went home", make())
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize("inputs", ["", ["", " Mary"], []])
def test_empty_prompts(wordy: TransformerBridge, inputs: Any) -> None:
    with pytest.raises(RelevanceError):
        propagate(wordy, inputs, logit(" Mary"))


def test_prompts_that_do_not_fit(wordy: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="context is 32"):
        propagate(wordy, " Mary" * 40, logit(" Mary"))
    with pytest.raises(RelevanceError, match="attention_mask"):
        propagate(wordy, " Mary went", logit(" Mary"), attention_mask=torch.ones(1, 3))
    with pytest.raises(RelevanceError, match="equally many tokens|same number"):
        propagate(wordy, [" Mary went", " Mary"], logit(" Mary"), reference=[" John", " John went"])


def test_strings_are_masked_by_us(wordy: TransformerBridge) -> None:
    """Prompts of unequal length in one batch: BOS in front, padding masked, each as if alone."""
    prompts = [" Mary went home", " John"]
    together = propagate(wordy, prompts, logit_diff(" Mary", " John"))
    assert together.input_tokens[:, 0].tolist() == [wordy.tokenizer.bos_token_id] * 2
    assert together.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    for i, prompt in enumerate(prompts):
        alone = propagate(wordy, prompt, logit_diff(" Mary", " John"))
        n = alone.tokens().shape[1]
        assert together.tokens()[i, :n].tolist() == pytest.approx(alone.tokens()[0].tolist(), rel=1e-4, abs=1e-6)
        assert not together.tokens()[i, n:].any()


def test_bos_is_kept_by_made_references(wordy: TransformerBridge) -> None:
    for reference in (mean_embedding(), random_tokens(2)):
        cache = propagate(wordy, " Mary went home", logit(" Mary"), reference=reference)
        assert not cache.tokens()[:, 0].any() and cache.tokens()[:, 1:].any()


def test_a_flat_reference_adds_up() -> None:
    """A baseline whose variance is not above a norm's eps: 1/sqrt(variance) is huge there, and relevance is not."""
    for reference in (zero_embedding(), torch.zeros(16)):
        cache = propagate(build_llama(), TOKENS, TARGET, reference=reference)
        gap = cache.value - cache.reference_value
        torch.testing.assert_close(cache.tokens().sum(1), gap, rtol=1e-4, atol=1e-5)
        assert bool((cache.tokens().abs().sum(1) < 20 * gap.abs().clamp(min=0.1)).all())


def test_rulesets_are_registered_once_and_checked() -> None:
    name = "of_this_test"
    try:
        register_ruleset(name, {**rulesets()["attnlrp"], "norm@ln_final": Rule()})
        model = build("gpt2")
        mine, theirs = (propagate(model, TOKENS, TARGET, rules=r) for r in (name, "attnlrp"))
        assert mine.info["ruleset"] == name and not torch.allclose(mine.tokens(), theirs.tokens())
        with pytest.raises(RelevanceError, match="exists already"):
            register_ruleset(name, {})
    finally:
        sys.modules["lens_relevance.ruleset_tables"]._RULESETS.pop(name, None)  # type: ignore[attr-defined]
    with pytest.raises(RelevanceError, match="unknown operation"):
        register_ruleset("wrong", {"softmax": Rule()})
    assert "wrong" not in rulesets()


def test_top_prediction_is_explained_where_no_target_is_given() -> None:
    model = build_gpt2()
    cache = propagate(model, TOKENS)
    best = cache.logits[:, -1].topk(2).values
    assert cache.value.tolist() == pytest.approx((best[:, 0] - best[:, 1]).tolist())


def test_a_scalar_target_is_shared_by_the_batch() -> None:
    def total(logits: Tensor) -> Tensor:
        return logits[:, -1, 3].sum()

    cache = propagate(build("gpt2"), TOKENS, total, rules="cp_lrp")
    row = propagate(build("gpt2"), TOKENS, logit(3), rules="cp_lrp")
    assert torch.allclose(cache.tokens(), row.tokens(), rtol=1e-12)
