"""Baselines of token relevance: each against a loop over the model's own tensors, written from its paper."""

from __future__ import annotations

import itertools
import sys
from math import factorial

import numpy as np
import pytest
import torch
from torch import Tensor

from analyses.methods import atman, estimator, grad_cam, integrated_gradients, kernel_shap, smoothgrad
from analyses.methods.kernel_shap_method import coalitions, shapley_regression
from analyses.perturbation import areas, by_attention, image_curves, passes, perturbation_curves
from lens_relevance import RelevanceError, latent, logit, mean_embedding
from tests import models
from tests.analyses.test_ranking import random_pairs
from tests.classifiers import build_classifier, inputs_for
from tests.encoder_decoders import build_encoder_decoder, sources_and_targets
from tests.precision import no_upcasts

TARGET = logit(7)
OF_TOKENS = ["integrated_gradients", "smoothgrad", "kernel_shap", "atman"]


@pytest.fixture
def captum() -> None:
    pytest.importorskip("captum", reason="captum is not installed (the extra baselines)")


def by_embeddings(model, tokens, embeddings, token=7):
    """The logit of a token at the last position, of copies of one row with other embeddings."""
    with model.hooks(fwd_hooks=[("embed.hook_out", lambda x, hook: embeddings)]):
        return model(tokens.expand(len(embeddings), -1), return_type="logits", use_cache=False)[:, -1, token]


def own_and_mean(model, tokens):
    weight = model.original_model.transformer.wte.weight.detach()
    return weight[tokens], weight.mean(0).expand(*tokens.shape, -1)


def gradient_at(model, tokens, embeddings):
    leaf = embeddings.clone().requires_grad_()
    return torch.autograd.grad(by_embeddings(model, tokens, leaf).sum(), leaf)[0]


def test_integrated_gradients_equal_a_loop_and_add_up(captum, tokens):
    model = models.build_gpt2(torch.float64)
    own, mean = own_and_mean(model, tokens)
    nodes, weights = np.polynomial.legendre.leggauss(20)
    expected = torch.zeros_like(own)
    for row in range(2):
        for t, w in zip((nodes + 1) / 2, np.float32(weights / 2), strict=True):  # captum rounds the weights
            at = mean[row : row + 1] + float(t) * (own - mean)[row : row + 1]
            expected[row] += float(w) * gradient_at(model, tokens[row : row + 1], at)[0]
    found = integrated_gradients(20).tokens(model, tokens, TARGET)
    torch.testing.assert_close(found, ((own - mean) * expected).sum(-1), rtol=0, atol=1e-9)
    with torch.no_grad():
        gaps = [by_embeddings(model, tokens[i : i + 1], x[i : i + 1]) for i in range(2) for x in (own, mean)]
    torch.testing.assert_close(found.sum(1), torch.cat([gaps[0] - gaps[1], gaps[2] - gaps[3]]), rtol=0, atol=1e-4)


def test_smoothgrad_equals_a_loop(captum, tokens):
    model = models.build_gpt2(torch.float64)
    own, _ = own_and_mean(model, tokens)
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for row in range(2):
        one = own[row : row + 1]
        torch.manual_seed(3)
        noise = torch.normal(0, torch.full((5, *one.shape[1:]), 0.2 * float(one.max() - one.min())))  # captum's is float32
        mean = sum(gradient_at(model, tokens[row : row + 1], one + step) for step in noise) / 5
        expected[row] = (mean * one).sum(-1)
    before = torch.random.get_rng_state()
    found = smoothgrad(5, 0.2, seed=3).tokens(model, tokens, TARGET)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    none = smoothgrad(2, 0.0).tokens(model, tokens, TARGET)
    plain = torch.cat([gradient_at(model, tokens[i : i + 1], own[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(none, (own * plain).sum(-1), rtol=0, atol=1e-9)


def test_kernel_shap_with_all_coalitions_gives_shapley_values():
    model, tokens = models.build_gpt2(torch.float64), models.random_tokens(1, 4)
    own, mean = own_and_mean(model, tokens)
    value = {}
    for kept in itertools.product([False, True], repeat=4):
        with torch.no_grad():
            value[kept] = by_embeddings(model, tokens, torch.where(torch.tensor(kept)[:, None], own, mean)).item()
    expected = torch.zeros(1, 4, dtype=torch.float64)
    for i in range(4):
        for kept in itertools.product([False, True], repeat=4):
            if not kept[i]:
                size = sum(kept)
                joined = (*kept[:i], True, *kept[i + 1 :])
                expected[0, i] += factorial(size) * factorial(3 - size) / factorial(4) * (value[joined] - value[kept])
    found = kernel_shap(14).tokens(model, tokens, TARGET)
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_drawn_coalitions_give_shapley_values_of_games_that_they_determine():
    kept, weights = coalitions(12, 200, seed=0)
    assert kept.shape == (200, 12) and torch.equal(kept[:100], ~kept[100:]) and not kept.all(1).any() and kept.any(1).all()
    worth = torch.arange(12.0, dtype=torch.float64) - 3
    ends = torch.tensor([2.0, 2.0 + float(worth.sum())], dtype=torch.float64)
    additive = torch.cat([ends, 2 + kept.double() @ worth])
    torch.testing.assert_close(shapley_regression(kept, weights, additive), worth, rtol=0, atol=1e-9)
    symmetric = torch.cat([torch.tensor([0.0, 144.0], dtype=torch.float64), kept.double().sum(1) ** 2])
    assert (shapley_regression(kept, weights, symmetric) - 12).abs().max() < 1.5
    assert torch.equal(coalitions(12, 200, seed=0)[0], kept) and not torch.equal(coalitions(12, 200, seed=1)[0], kept)


def z_with_suppressed(q: Tensor, k: Tensor, v: Tensor, token: int, *, causal: bool) -> Tensor:
    """softmax of scores of which those for one key are times 0.1, times the values; all as [batch, head, pos, d_head]."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores[..., token] = scores[..., token] * 0.1
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("family", ["gpt2", "bert_classifier", "vit"])
def test_atman_equals_attention_computed_anew(family, tokens):
    model = models.build_gpt2(torch.float64) if family == "gpt2" else build_classifier(family)
    given, heads = inputs_for("vit")[0] if family == "vit" else tokens, model.cfg.n_heads
    target = (lambda logits: logits[:, -1, 7]) if family == "gpt2" else (lambda logits: logits.flatten(0, -2)[:, 1])

    def suppressed(token):
        kept = {}

        def keep(x, hook):
            kept[hook.name.split(".")[3]] = x.flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)

        def replace(x, hook):
            z = z_with_suppressed(kept["q"], kept["k"], kept["v"], token, causal=family == "gpt2").transpose(1, 2)
            return z.reshape(x.shape)

        names = [f"blocks.{layer}.attn" for layer in range(2)]
        hooks = [(f"{name}.{part}.hook_out", keep) for name in names for part in "qkv"] + [(f"{name}.o.hook_in", replace) for name in names]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            return target(model(given, return_type="logits"))

    first = 1 if family == "vit" else 0  # a class token stands before the six patches
    with torch.no_grad(), no_upcasts():
        whole = target(model(given, return_type="logits"))
        expected = torch.stack([whole - suppressed(token + first) for token in range(6)], 1)
        found = atman().tokens(model, given, logit(7) if family == "gpt2" else logit(1))
    assert expected.abs().min() > 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_atman_of_an_encoder_is_suppressed_across_too():
    """Of T5 the encoder's last layer alone reaches the answer through the cross-attention, which reads the token as well."""
    model, given = build_encoder_decoder("t5"), sources_and_targets()[0]
    found = atman(1.0).tokens(model, given, TARGET, stack="encoder")

    def silenced(x, hook):
        x = x.clone()
        x[:, 2] = 0
        return x

    stacks = [f"encoder_blocks.{i}.attn" for i in range(2)] + [f"decoder_blocks.{i}.cross_attn" for i in range(2)]
    with torch.no_grad():
        whole = model(given["input_ids"], decoder_input_ids=given["decoder_input_ids"])[:, -1, 7]
        with model.hooks(fwd_hooks=[(f"{name}.k.hook_out", silenced) for name in stacks]):
            without = model(given["input_ids"], decoder_input_ids=given["decoder_input_ids"])[:, -1, 7]
    torch.testing.assert_close(found[:, 2], whole - without, rtol=0, atol=1e-9)
    assert atman().tokens(model, given, TARGET, stack="decoder").shape == (2, 4)


def test_grad_cam_equals_its_definition(captum):
    model, picture = build_classifier("vit"), inputs_for("vit")[0]
    kept = {}
    norm = model.original_model.vit.layers[-1].layernorm_before if hasattr(model.original_model.vit, "layers") else None
    norm = model.original_model.vit.encoder.layer[-1].layernorm_before if norm is None else norm
    handle = norm.register_forward_hook(lambda module, args, out: kept.update(x=out))
    gradient = torch.autograd.grad(model(picture, return_type="logits")[:, 1].sum(), kept["x"])[0]
    handle.remove()
    expected = (kept["x"][:, 1:] * gradient[:, 1:].mean(1, keepdim=True)).sum(-1).clamp(min=0)
    found = grad_cam().tokens(model, picture, logit(1))
    assert expected.max() > 1e-3
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["integrated_gradients", "kernel_shap", "atman"])
def test_padding_changes_nothing_and_gets_zero(captum, method, gpt2):
    short, mask = models.random_tokens(1, 4, seed=3), torch.tensor([[0, 0, 1, 1, 1, 1]])
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)
    found = estimator(method).tokens(gpt2, padded, TARGET, attention_mask=mask)
    alone = estimator(method).tokens(gpt2, short, TARGET)
    assert (found[0, :2] == 0).all()
    torch.testing.assert_close(found[:, 2:], alone, rtol=1e-3, atol=1e-5)


def test_pictures_patch_by_patch(captum):
    """What a patch gets does not depend on where its pixels stand: the sums over channels and pixels of integrated gradients."""
    model, (picture, other) = build_classifier("vit"), inputs_for("vit")
    found = integrated_gradients(20).tokens(model, picture, logit(1), reference=other)
    with torch.no_grad():
        gap = model(picture, return_type="logits")[:, 1] - model(other, return_type="logits")[:, 1]
    torch.testing.assert_close(found.sum(1), gap, rtol=0, atol=1e-4)
    shap = kernel_shap().tokens(model, picture, logit(1), reference=other)
    torch.testing.assert_close(shap.sum(1), gap, rtol=0, atol=1e-9)
    curves = areas(image_curves(model, picture, methods=["grad_cam", "smoothgrad", "atman", "kernel_shap"], patch=4))
    assert set(curves["method"]) == {"random", "grad_cam", "smoothgrad", "atman", "kernel_shap"} and curves["area"].notna().all()


def test_perturbation_tables_take_them(captum, gpt2, tokens):
    before = {name: p.requires_grad for name, p in gpt2.named_parameters()}
    curves = areas(perturbation_curves(gpt2, tokens, TARGET, methods=OF_TOKENS))
    assert set(curves["method"]) == {"random", *OF_TOKENS} and curves["area"].notna().all()
    assert {name: p.requires_grad for name, p in gpt2.named_parameters()} == before
    assert not any(point.fwd_hooks or point.bwd_hooks for point in gpt2.hook_dict.values())


def test_costs_in_passes_over_a_prompt():
    """Counted in forwards of the model, but those that the tests of the target itself take."""
    asked = {"attnlrp": (1, 1), "deeplift": (2, 1), "chefer_2021b": (1, 1), "integrated_gradients": (50, 50), "kernel_shap": (514, 0)}
    assert {method: passes(method, 6) for method in asked} == asked
    assert passes("atman", 6) == (7, 0) == passes("occlusion", 6) and passes("random", 6) == (0, 0) and passes("grad_cam", 6) == (1, 1)
    assert passes(by_attention("chefer_2021a", rules="attnlrp"), 6) == (2, 2)
    with pytest.raises(RelevanceError, match="eap_ig scores no tokens of single prompts"):
        passes("eap_ig", 6)


def test_rows_that_methods_run_are_as_many_as_they_say(captum, gpt2):
    tokens, rows = models.random_tokens(1, 6), []
    methods = {
        "integrated_gradients": integrated_gradients(8),
        "smoothgrad": smoothgrad(4),
        "kernel_shap": kernel_shap(70),
        "atman": atman(),
    }
    for method in methods.values():
        handle = gpt2.original_model.register_forward_hook(lambda module, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True)
        method.tokens(gpt2, tokens, TARGET)
        handle.remove()
    # each runs once for the embeddings; mean_embedding() keeps none of these six tokens, so that kernel_shap takes all 62 coalitions
    assert sum(rows) == sum((8, 4, 64, 7)) + len(methods)


def test_bad_input(gpt2, tokens, monkeypatch):
    with pytest.raises(RelevanceError, match="kernel_shap scores the tokens of single prompts, not heads"):
        estimator("kernel_shap")(gpt2, random_pairs(2), ["heads"])
    with pytest.raises(RelevanceError, match="reads none: choose 'integrated_gradients'"):
        grad_cam().tokens(gpt2, tokens, TARGET)
    with pytest.raises(RelevanceError, match="explains a function of the logits"):
        kernel_shap().tokens(gpt2, tokens, latent("blocks.0.mlp.hook_out", unit=1))
    with pytest.raises(RelevanceError, match="token sets encoder, decoder: say which"):
        kernel_shap().tokens(build_encoder_decoder("t5"), sources_and_targets()[0], TARGET)
    with pytest.raises(RelevanceError, match="share above 0 and at most 1"):
        atman(0.0)
    with pytest.raises(RelevanceError, match="at least 2"):
        kernel_shap(1)
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(RelevanceError, match=r"pip install 'lens-relevance\[baselines\]'"):
        integrated_gradients().tokens(gpt2, tokens, TARGET, reference=mean_embedding())
