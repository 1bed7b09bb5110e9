"""chefer_2021a with its authors' rules: against the paper's formulas written out, and where its relevance adds up."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from analyses.benchmarks.tiny_models import build
from lens_relevance import log_prob, logit, logit_diff, propagate, token_relevance
from lens_relevance.attention_methods.additions import additions, normalised_additions
from lens_relevance.rules import Linear, Norm, NormIdentity, Softmax, SoftmaxIdentity, ZPlusRule
from lens_relevance.sites import anatomy
from tests import models
from tests.attention_methods.chefer_2021a_by_hand import chefer_2021a
from tests.classifiers import build_classifier, inputs_for
from tests.encoder_decoders import sources_and_targets
from tests.precision import no_upcasts

BY_HAND = {"vit": "vit", "bert_classifier": "bert", "gpt2": "gpt2"}


@pytest.mark.parametrize("family", list(BY_HAND))
def test_it_is_what_the_papers_formulas_give(family, monkeypatch):
    with no_upcasts():
        model = build("gpt2") if family == "gpt2" else build_classifier(family)
        inputs = models.random_tokens() if family == "gpt2" else inputs_for(family)[0]
        kept, before = {}, {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
        with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.0.hook_in", lambda x, hook: kept.update(x=x))]):
            logits = model(inputs, return_type="logits")
        expected, by_hand = chefer_2021a(model, BY_HAND[family], kept["x"], 1)
        last = logits[:, -1] if family == "gpt2" else logits.reshape(by_hand.shape)
        torch.testing.assert_close(by_hand, last, rtol=0, atol=1e-12)
        found = token_relevance(model, inputs, logit(1), method="chefer_2021a")
        monkeypatch.setattr("lens_relevance.attention_methods.methods.normalised_additions", lambda *_: nullcontext())
        plain_sums = token_relevance(model, inputs, logit(1), method="chefer_2021a")
    assert found.rules == "lrp_zplus" and (expected - torch.eye(expected.shape[1])).abs().max() > 1e-3
    torch.testing.assert_close(found.matrix, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.value, by_hand[:, 1], rtol=0, atol=1e-9)
    assert (plain_sums.matrix - expected).abs().max() > 1e-4
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == before


@pytest.mark.parametrize("family", ["gpt2", "neox_parallel", "bert"])
def test_relevance_keeps_its_sum_at_every_layer(family, tokens):
    """z+ hands on all that reaches an output with a positive contribution, and every other rule hands on all.

    With and without sums that are normalised. LRP-0 (cp_lrp) does not: its biases keep a share.
    """
    model = build(family)
    with no_upcasts():
        cache = propagate(model, tokens, logit(7), rules="lrp_zplus", audit=True)
        account = cache.conservation()
        assert account["unexplained"].abs().max() < 1e-9 and account["biases"].abs().max() < 1e-9
        total = torch.tensor((account["relevance"] + account["positions"]).to_numpy())
        torch.testing.assert_close(total, torch.tensor(account["value"].to_numpy()), rtol=0, atol=1e-9)
        leaves = anatomy(model).leaves
        with normalised_additions(model, anatomy(model)):
            normalised = propagate(model, tokens, logit(7), rules="lrp_zplus", names_filter=leaves)
        totals = [sum(one[name].flatten(1).sum(1) for name in leaves) for one in (normalised, cache)]
        torch.testing.assert_close(totals[0], cache.value, rtol=0, atol=1e-9)
        torch.testing.assert_close(totals[1], cache.value, rtol=0, atol=1e-9)
        assert not torch.allclose(normalised[leaves[0]], cache[leaves[0]], atol=1e-3)
        kept = propagate(model, tokens, logit(7), rules="cp_lrp", audit=True).conservation()
    assert kept[["biases", "norm_biases"]].abs().max(axis=None) > 1e-3


def test_what_has_no_positive_contribution_is_lost():
    op = Linear(torch.tensor([[1.0, -2.0], [-1.0, -3.0]], dtype=torch.float64), torch.tensor([0.5, 7.0], dtype=torch.float64))
    x, rule, g = torch.tensor([[[2.0, 1.0]]], dtype=torch.float64), ZPlusRule(), torch.tensor([[[3.0, 5.0]]], dtype=torch.float64)
    y = op(x)  # .5 and 2: relevance 1.5 and 10
    (coefficient,) = rule.backward(op, rule.keep(op, (x,), y, None), g)
    torch.testing.assert_close(
        x * coefficient, torch.tensor([[[1.5, 0.0]]], dtype=torch.float64)
    )  # all of the first, nothing of the second
    torch.testing.assert_close(rule.sink(op, (x,), y, None, g), torch.tensor([10.0], dtype=torch.float64))


def test_norm_and_softmax_leave_relevance_where_it_is():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, bias = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    norm = Norm(weight, bias, 1e-5, centred=True)
    for op, rule in ((norm, NormIdentity()), (Softmax(), SoftmaxIdentity())):
        given = x if op is norm else x.unsqueeze(1).masked_fill(torch.ones(3, 4).triu(2).bool(), float("-inf"))
        y, upstream = op(given), g if op is norm else g.unsqueeze(1)
        (coefficient,) = rule.backward(op, rule.keep(op, (given,), y, None), upstream)
        relevance = torch.where(coefficient == 0, 0.0, given * coefficient)
        torch.testing.assert_close(relevance, y * upstream, rtol=0, atol=1e-12)
        assert coefficient.isfinite().all() and rule.sink(op, (given,), y, None, upstream).abs().max() < 1e-12


def test_additions_of_each_kind_of_block():
    found = {family: additions(anatomy(build(family))) for family in ("gpt2", "neox_parallel", "bert", "gemma2", "t5", "bart")}
    assert found["gpt2"]["blocks.0.mlp.hook_out"] == ("blocks.0.ln2.hook_in",) and len(found["gpt2"]) == 4
    assert found["neox_parallel"] == {f"blocks.{i}.mlp.hook_out": (f"blocks.{i}.hook_in", f"blocks.{i}.attn.hook_out") for i in range(2)}
    assert found["bert"]["blocks.1.mlp.out.hook_out"] == ("blocks.1.ln1.hook_out",)
    assert found["gemma2"]["blocks.0.ln2_post.hook_out"] == ("blocks.0.ln2.hook_in",)
    assert found["t5"]["decoder_blocks.0.mlp.hook_out"] == ("decoder_blocks.0.hook_resid_mid2",) and len(found["t5"]) == 10
    assert found["bart"]["decoder_blocks.1.mlp.out.hook_out"] == ("decoder_blocks.1.ln2.hook_out",) and len(found["bart"]) == 10


@pytest.mark.parametrize("family", ["gpt2", "neox_parallel", "bert", "gemma2", "t5", "bart"])
def test_each_addition_is_one(family):
    """What is added up is what the stream holds next: the sum of the tensors of each addition passes a HookPoint further on."""
    model, inputs = build(family), sources_and_targets()[0] if family in ("t5", "bart") else models.random_tokens()
    kept = {}
    names = [name for name in anatomy(model).points if name.endswith(("hook_in", "hook_out", "resid_mid", "resid_mid2"))]
    with torch.no_grad(), model.hooks(fwd_hooks=[(names.__contains__, lambda x, hook: kept.update({hook.name: x}))]):
        model(inputs.pop("input_ids"), **inputs) if isinstance(inputs, dict) else model(inputs)
    for branch, others in additions(anatomy(model)).items():
        total = kept[branch] + sum(kept[name] for name in others)
        assert any(
            x.shape == total.shape and torch.allclose(x, total, rtol=0, atol=1e-6) for x in kept.values() if isinstance(x, torch.Tensor)
        )


def test_several_logits_start_with_a_total_of_one(gpt2, tokens):
    for target in (logit_diff(7, 11), log_prob(7), None, lambda logits: logits[:, -1, 7] - logits[:, -1, 11]):
        found = token_relevance(gpt2, tokens, target, method="chefer_2021a")
        assert found.scores.isfinite().all() and (found.heads > 0).any()
    one = token_relevance(gpt2, tokens, logit_diff(7, 11), method="chefer_2021a")
    torch.testing.assert_close(one.value, token_relevance(gpt2, tokens, logit_diff(7, 11), method="chefer").value)
