"""deeplift: contributions add up to the difference of the two runs at every cut, whatever the model, reference and target."""

from __future__ import annotations

import pytest
import torch

from analyses.benchmarks.tiny_models import build as build_tiny
from lens_relevance import RelevanceCache, log_prob, logit, logit_diff, mean_embedding, propagate, random_tokens
from lens_relevance.inputs import references
from lens_relevance.inputs.prompt import Prompt, read_inputs
from tests.encoder_decoders import build_encoder_decoder
from tests.engine.families import FAMILIES, TARGET, UPCASTING, build, close, exact, inputs_and_reference, unexplained, whole
from tests.models import build_gpt2, build_llama, build_native
from tests.precision import no_upcasts

TOKENS, OTHER = inputs_and_reference()


def incompleteness(cache: RelevanceCache) -> float:
    """Largest error of the sum over positions at any residual cut, relative to the difference of the two runs."""
    difference = whole(cache).unsqueeze(1)
    assert float(difference.abs().min()) > 1e-3
    return float(((cache.residual().sum(1) - difference) / difference).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness_at_every_cut(family: str) -> None:
    with exact(family):
        model = build(family, n_layers=3)
        assert incompleteness(propagate(model, TOKENS, TARGET, reference=OTHER)) < 1e-9
        for reference in (mean_embedding(), random_tokens(3)):
            assert incompleteness(propagate(model, TOKENS, TARGET, reference=reference)) < 1e-9


@pytest.mark.parametrize("family", UPCASTING)
def test_completeness_where_norms_are_computed_in_fp32(family: str) -> None:
    assert incompleteness(propagate(build(family), TOKENS, TARGET, reference=OTHER)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness_in_fp32_and_bf16_is_finite_and_near(family: str) -> None:
    """Of bf16 this is no promise of precision: what bf16 activations allow."""
    full = propagate(build(family, torch.float32), TOKENS, TARGET, reference=OTHER)
    assert incompleteness(full) < 1e-4
    cache = propagate(build(family, torch.bfloat16), TOKENS, TARGET, reference=OTHER)
    assert all(bool(torch.isfinite(cache[name]).all()) for name in cache)
    assert torch.corrcoef(torch.stack([cache.tokens().flatten().float(), full.tokens().flatten()]))[0, 1] > 0.98


def test_tokens_and_positions_account_for_the_embeddings() -> None:
    """Positions are the same in both runs; all of the difference is at the tokens, and none at tokens that are the same."""
    cache = propagate(build_gpt2(dtype=torch.float64), TOKENS, TARGET, reference=OTHER)
    close(cache.tokens().sum(1), whole(cache), 1e-9)
    assert cache.positions().abs().max() == 0
    same = TOKENS == OTHER
    assert bool(same.any()) and cache.tokens()[same].abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_runs_give_the_plain_gradient(family: str) -> None:
    with exact(family):
        model = build(family)
        pair = propagate(model, TOKENS, TARGET, rules="deeplift", reference=TOKENS)
        gradient = propagate(model, TOKENS, TARGET, rules="gradient")
    for name in gradient:
        close(pair.coefficients[name], gradient.coefficients[name], 1e-9)
        assert pair[name].abs().max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_coefficients_are_symmetric_in_the_two_runs(family: str) -> None:
    with exact(family):
        model = build(family)
        one = propagate(model, TOKENS, TARGET, rules="deeplift", reference=OTHER)
        two = propagate(model, OTHER, TARGET, rules="deeplift", reference=TOKENS)
    for name in one:
        close(one.coefficients[name], two.coefficients[name], 1e-9)
        if name != "pos_embed.hook_out":  # the same in both runs
            close(one[name], -two[name], 1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "native_soft_caps"])
def test_targets_that_are_not_linear_in_the_logits(family: str) -> None:
    with exact(family):
        model = build(family)
        for target in (log_prob(5), logit(5), logit_diff(5, 6, position=2), logit_diff([5, 6], [7, 8])):
            cache = propagate(model, TOKENS, target, reference=OTHER, audit=True)
            assert incompleteness(cache) < 1e-9, target
            assert unexplained(cache) < 1e-9
            assert cache.conservation()["target"].abs().max() < 1e-9


def test_a_callable_target_leaves_what_quadrature_misses_in_its_own_sink() -> None:
    model = build_gpt2(dtype=torch.float64)

    def smooth(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].softmax(-1)[:, 5] * 10

    cache = propagate(model, TOKENS, smooth, reference=OTHER, audit=True)
    assert incompleteness(cache) < 1e-6 and unexplained(cache) < 1e-9

    def kinked(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].relu().sum(-1)

    cache = propagate(model, TOKENS, kinked, reference=OTHER, audit=True)
    left = cache.conservation().query("layer == 'output'")["target"]
    assert left.abs().min() > 1e-6  # a kink is only met approximately, and the account says by how much
    assert left.tolist() == pytest.approx((whole(cache) - cache.residual()[:, :, 0].sum(1)).tolist(), rel=1e-6)
    assert unexplained(cache) < 1e-9


def test_variant_with_the_ln_rule_leaves_the_rest_in_the_norms() -> None:
    cache = propagate(build_gpt2(dtype=torch.float64), TOKENS, TARGET, rules="deeplift_ln", reference=OTHER, audit=True)
    assert incompleteness(cache) > 1e-2
    account = cache.conservation()
    assert unexplained(cache) < 1e-9 and account["norm"].abs().max() > 1e-2
    others = account.drop(columns=["example", "layer", "value", "relevance", "norm"])
    assert others.abs().max().max() < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "t5"])
def test_by_default_tokens_are_explained_against_the_mean_embedding(family: str) -> None:
    model = build_encoder_decoder("t5", torch.float32) if family == "t5" else build_tiny(family)
    expected = propagate(model, TOKENS, TARGET, rules="deeplift", reference=mean_embedding())

    def differs(found: RelevanceCache) -> bool:
        return all(not torch.equal(found[name], expected[name]) for name in expected if "neuron" not in name and expected[name].any())

    for given in ({}, {"rules": "deeplift"}, {"reference": mean_embedding()}):
        found = propagate(model, TOKENS, TARGET, **given)
        assert found.info == expected.info and found.info["ruleset"] == "deeplift" and found.info["reference"] == "mean_embedding()"
        assert all(torch.equal(found[name], expected[name]) for name in expected) and sum(bool(found[name].any()) for name in expected) > 5
    alone = propagate(model, TOKENS, TARGET, rules="attnlrp")
    assert alone.reference_value is None and differs(alone)
    partly = propagate(model, TOKENS, TARGET, rules="deeplift_ln")
    assert partly.info["reference"] == "mean_embedding()" and differs(partly)
    assert propagate(model, TOKENS, TARGET, reference=OTHER).info["ruleset"] == "deeplift"


def test_several_references_are_averaged() -> None:
    """The same as one run per reference, row by row, and their mean."""
    model = build_gpt2(dtype=torch.float64)
    many = random_tokens(3, seed=5)
    together = propagate(model, TOKENS, TARGET, reference=many)
    rows = many.run(model, Prompt(TOKENS, torch.ones_like(TOKENS))).prompt.tokens
    each = [propagate(model, TOKENS, TARGET, reference=rows[i::3]) for i in range(3)]
    assert rows.shape == (6, 6) and not torch.equal(rows[0], rows[1])
    for name in together:
        if name != "pos_embed.hook_out":
            close(together[name], torch.stack([one[name] for one in each]).mean(0), 1e-9)
        close(together.coefficients[name], torch.stack([one.coefficients[name] for one in each]).mean(0), 1e-9)
    close(whole(together), torch.stack([whole(one) for one in each]).mean(0), 1e-12)
    close(together.value, each[0].value, 1e-12)
    assert together.logits.shape == (2, 1, 50)


def test_references_by_embedding() -> None:
    with no_upcasts():
        model = build_llama(dtype=torch.float64)
        table = model.W_E.detach()
        mean = propagate(model, TOKENS, TARGET, reference=mean_embedding())
        same = propagate(model, TOKENS, TARGET, reference=table.mean(0))
        written_out = propagate(model, TOKENS, TARGET, reference=table.mean(0).expand(2, 6, -1).contiguous())
        tokens_as_embeddings = propagate(model, TOKENS, TARGET, reference=table[OTHER])
        as_tokens = propagate(model, TOKENS, TARGET, reference=OTHER)
    for other in (same, written_out):
        close(mean.tokens(), other.tokens(), 1e-12)
    close(tokens_as_embeddings.tokens(), as_tokens.tokens(), 1e-12)
    close(mean.reference_activations["embed.hook_out"], table.mean(0).expand(2, 6, -1), 1e-12)


def test_a_saturated_model_where_the_gradient_sees_nothing() -> None:
    """Scores so large that every pattern is one-hot: the gradient at queries and keys is zero, the effect through them is not."""
    model = build_native(dtype=torch.float64, n_layers=1)
    attention = model.original_model.layers[0].attn
    with torch.no_grad():
        for part in (attention.q, attention.k):
            part.weight *= 300
    names = [f"blocks.0.attn.{p}.hook_out" for p in ("q", "k")]
    gradient = propagate(model, TOKENS, TARGET, rules="gradient", reference=OTHER, names_filter=names)
    pair = propagate(model, TOKENS, TARGET, reference=OTHER, names_filter=[*names, "blocks.0.hook_in"])
    assert max(float(gradient[name].abs().max()) for name in names) < 1e-12
    assert all(float(pair[name].abs().max()) > 1e-2 for name in names)
    close(pair["blocks.0.hook_in"].sum((1, 2)), whole(pair), 1e-9)


def test_the_mean_embedding_is_computed_once_for_an_embedding_that_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("gemma3")  # which scales its embeddings by a buffer
    calls: list[str] = []
    mean_row = references._mean_row
    monkeypatch.setattr(references, "_mean_row", lambda embedding: calls.append("tokens") or mean_row(embedding))

    def mean() -> torch.Tensor:
        found = mean_embedding().run(model, read_inputs(model, TOKENS)).embeddings["tokens"][1]
        ids = torch.arange(model.cfg.d_vocab)
        torch.testing.assert_close(found, references._embedding(model, "tokens")(ids).mean(0), rtol=1e-5, atol=1e-7)
        return found

    first = mean()
    first.zero_()  # what is handed out is a copy
    assert mean().abs().max() > 0 and calls == ["tokens"]
    embedding = references._embedding(model, "tokens")
    with torch.no_grad():
        embedding.weight[3] += 1.0
    mean()
    assert len(calls) == 2
    embedding.embed_scale.mul_(2.0)
    mean()
    assert len(calls) == 3
    embedding.weight.data = embedding.weight.data.clone() * 3
    mean()
    assert len(calls) == 4
    mean()
    assert len(calls) == 4
    handle = embedding.register_forward_hook(lambda module, inputs, output: output + 1)
    mean()
    mean()
    handle.remove()
    assert len(calls) == 6  # hooks can do anything, so nothing is kept
