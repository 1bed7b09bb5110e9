"""token_relevance: every method against a straightforward computation, padding, scores of heads, and bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from lens_relevance import CoverageError, RelevanceError, logit, logit_diff, propagate
from lens_relevance.attention_methods import METHODS, token_relevance
from tests import models
from tests.attention_methods.oracle import chefer_2021b, patterns_and_gradients
from tests.classifiers import build_classifier
from tests.precision import no_upcasts

TARGET = logit(7)
CHAINS = ["weighted_accumulation", "chefer_2021b", "chefer_2021a", "rollout", "globenc"]
TINY = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def post_norm_models():
    gemma = Gemma2Config(**TINY, head_dim=4, query_pre_attn_scalar=4)
    return {
        "gemma2": models.bridge_from_config(Gemma2ForCausalLM, gemma),
        "olmo2": models.bridge_from_config(Olmo2ForCausalLM, Olmo2Config(**TINY)),
    }


def test_chefer_equals_a_loop(tokens):
    model = models.build_gpt2(torch.float64, n_layers=3)
    expected = chefer_2021b(*patterns_and_gradients(model, tokens, 7))
    found = token_relevance(model, tokens, TARGET, method="chefer_2021b")
    assert expected.std() > 1e-3
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.scores, expected[:, -1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rules", ["gradient", "attnlrp"])
def test_equal_importance_is_chefer(tokens, rules):
    model = models.build_neox(dtype=torch.float64)
    chefer = token_relevance(model, tokens, TARGET, method="chefer", rules=rules)
    equal = token_relevance(model, tokens, TARGET, method="weighted_accumulation", importance="equal", rules=rules)
    torch.testing.assert_close(equal.matrix, chefer.matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(equal.heads, chefer.heads, rtol=0, atol=1e-12)
    assert not torch.allclose(token_relevance(model, tokens, TARGET, rules=rules).scores, chefer.scores, atol=1e-3)


@pytest.mark.parametrize("importance", ["relevance", "norm", "grad_norm"])
def test_weighted_accumulation_equals_a_loop(tokens, importance):
    model = models.build_gpt2(torch.float64)
    patterns, gradients = patterns_and_gradients(model, tokens, 7)
    names = [f"blocks.{i}.{p}" for i in range(2) for p in ("hook_resid_pre", "hook_attn_out")]
    cache = propagate(model, tokens, TARGET, rules="gradient", names_filter=names)
    r = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    for layer in range(2):
        before = cache.activations[cache.canonical(f"blocks.{layer}.hook_resid_pre")]
        written = cache.activations[cache.canonical(f"blocks.{layer}.hook_attn_out")]
        g = cache.coefficients[cache.canonical(f"blocks.{layer}.hook_attn_out")]
        measure = {
            "relevance": lambda a, g=g: (a * g).sum(-1).abs(),
            "norm": lambda a: a.norm(dim=-1),
            "grad_norm": lambda a, g=g: (a * g).norm(dim=-1),
        }[importance]
        bar = (patterns[layer] * gradients[layer]).clamp(min=0).mean(1)
        alpha, beta = torch.ones(2, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.float64)
        for example in range(2):
            for token in range(6):
                w, b = measure(written)[example, token], measure(before)[example, token]
                if w + b > 0:
                    alpha[example, token], beta[example, token] = 2 * w / (w + b), 2 * b / (w + b)
        r = beta[:, :, None] * r + alpha[:, :, None] * (bar @ r)
    found = token_relevance(model, tokens, TARGET, importance=importance)
    torch.testing.assert_close(found.matrix, r, rtol=0, atol=1e-12)


def test_chefer_2021a_multiplies_gradient_and_lrp_relevance(tokens):
    model = models.build_gpt2(torch.float64)
    patterns, gradients = patterns_and_gradients(model, tokens, 7)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(2)]
    lrp = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=names)
    r = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    for name, gradient in zip(names, gradients, strict=True):
        r = r + (gradient * lrp[name]).clamp(min=0).mean(1) @ r
    found = token_relevance(model, tokens, TARGET, method="chefer_2021a", rules="attnlrp")
    torch.testing.assert_close(found.matrix, r, rtol=0, atol=1e-12)
    plain = token_relevance(model, tokens, TARGET, method="chefer_2021a", rules="gradient").layers[:, 1]
    expected = (gradients[1] ** 2 * patterns[1]).mean(1) * ((patterns[1] > 0).any(1)) + torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-12)


def test_rollout_rows_sum_to_one_and_equal_a_loop(llama, tokens):
    found = token_relevance(llama, tokens, TARGET, method="rollout")
    torch.testing.assert_close(found.matrix.sum(-1), torch.ones(2, 6))
    patterns, _ = patterns_and_gradients(llama, tokens, 7)
    r = torch.eye(6).expand(2, 6, 6)
    for pattern in patterns:
        augmented = pattern.mean(1) + torch.eye(6)
        r = augmented / augmented.sum(-1, keepdim=True) @ r
    torch.testing.assert_close(found.matrix, r)


def globenc_by_hand(model, tokens, layer, parallel):
    """N of one layer with the full [token, source, d_model] tensor, in GPT-2 and NeoX."""
    _, cache = model.run_with_cache(tokens)
    pattern, v = cache[f"blocks.{layer}.attn.hook_pattern"], cache[f"blocks.{layer}.attn.hook_v"]
    x = cache[f"blocks.{layer}.hook_resid_pre"]
    w_o = model.W_O[layer]
    z = torch.einsum("bhij,bjhe,hed->bijd", pattern, v, w_o)
    z = z + torch.diag_embed(x.permute(0, 2, 1)).permute(0, 2, 3, 1)
    last = layer + 1 == len(model.blocks)
    norm = model.blocks[layer].ln2 if not parallel else (model.ln_final if last else model.blocks[layer + 1].ln1)
    read = cache[f"blocks.{layer}.hook_resid_post" if parallel else f"blocks.{layer}.hook_resid_mid"]
    original = norm.original_component
    std = (read.var(-1, unbiased=False) + original.eps).sqrt()[:, :, None, None]
    return ((z - z.mean(-1, keepdim=True)) / std * original.weight).norm(dim=-1)


@pytest.mark.parametrize("parallel", [False, True])
def test_globenc_equals_the_definition(tokens, parallel):
    model = models.build_neox(parallel=True, dtype=torch.float64) if parallel else models.build_gpt2(torch.float64)
    found = token_relevance(model, tokens, TARGET, method="globenc")
    with torch.no_grad():
        expected = [globenc_by_hand(model, tokens, layer, parallel) for layer in range(2)]
    torch.testing.assert_close(found.layers, torch.stack(expected, 1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.matrix, expected[1] @ expected[0], rtol=1e-9, atol=1e-9)


def test_globenc_passes_both_norms_of_bert(tokens):
    """The authors' definition with the full [token, source, d_model] tensor, one source's vector after the other."""
    model = build_classifier("bert", torch.float64)
    found = token_relevance(model, tokens, logit(1), method="globenc").layers
    _, cache = model.run_with_cache(tokens)
    for layer in range(2):
        at, original = f"blocks.{layer}.", model.original_model.bert.encoder.layer[layer]
        weight = original.attention.output.dense.weight  # [d_model, head * d_head]
        x, pattern, v = cache[f"{at}hook_in"], cache[f"{at}attn.hook_pattern"], cache[f"{at}attn.v.hook_out"]
        v = v if v.ndim == 4 else v.unflatten(-1, (pattern.shape[1], -1))
        norms = [(original.attention.output.LayerNorm, cache[f"{at}ln1.hook_in"]), (original.output.LayerNorm, cache[f"{at}ln2.hook_in"])]
        expected = torch.zeros(2, 6, 6, dtype=torch.float64)
        for row, i, j in itertools.product(range(2), range(6), range(6)):
            z = weight @ (pattern[row, :, i, j, None] * v[row, j]).flatten() + (x[row, i] if i == j else 0)
            for norm, read in norms:
                z = (z - z.mean()) / (read[row, i].var(unbiased=False) + norm.eps).sqrt() * norm.weight
            expected[row, i, j] = z.norm()
        torch.testing.assert_close(found[:, layer], expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_globenc_passes_a_norm_on_the_attention_output(tokens, family):
    model = post_norm_models()[family]
    found = token_relevance(model, tokens, TARGET, method="globenc").layers
    _, cache = model.run_with_cache(tokens)
    for layer in range(2):
        z = torch.einsum(
            "bhij,bjhe,hed->bijd",
            cache[f"blocks.{layer}.attn.hook_pattern"],
            cache[f"blocks.{layer}.attn.v.hook_out"].repeat_interleave(2, 2),
            model.W_O[layer],
        )
        post = model.blocks[layer].ln1_post.original_component.weight + (1 if family == "gemma2" else 0)
        written = cache[f"blocks.{layer}.attn.hook_out"]
        z = z * post / (written.pow(2).mean(-1) + 1e-6 if family == "gemma2" else written.pow(2).mean(-1) + 1e-5).sqrt()[:, :, None, None]
        x = cache[f"blocks.{layer}.hook_resid_pre"]
        torch.testing.assert_close(z.sum(2), cache[f"blocks.{layer}.hook_attn_out"], rtol=1e-3, atol=1e-4)
        z = z + torch.diag_embed(x.permute(0, 2, 1)).permute(0, 2, 3, 1)
        if family == "gemma2":
            middle = cache[f"blocks.{layer}.hook_resid_mid"]
            z = z * (1 + model.blocks[layer].ln2.original_component.weight) / (middle.pow(2).mean(-1) + 1e-6).sqrt()[:, :, None, None]
        torch.testing.assert_close(found[:, layer], z.norm(dim=-1), rtol=1e-3, atol=1e-4)


def test_an_image_classifier():
    """Patches after the class token, which is explained; patterns and gradients from Hugging Face's own model."""
    sizes = dict(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model = models.bridge_from_config(ViTForImageClassification, ViTConfig(**sizes), torch.float64)
    own = ViTForImageClassification(ViTConfig(**sizes, attn_implementation="eager"))
    models.randomize(own, 0)
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    with no_upcasts():
        out = own.double().eval()(image, output_attentions=True)
        found = token_relevance(model, image, logit(1), method="chefer")
    gradients = torch.autograd.grad(out.logits[:, 1].sum(), out.attentions)
    expected = chefer_2021b([a.detach() for a in out.attentions], list(gradients))
    assert found.mask.shape == (2, 5) and found.explained[:, 0].eq(1).all() and len(found.to_frame()) == 10
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.scores, expected[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(token_relevance(model, image, logit(1), method="rollout").matrix.sum(-1), torch.ones(2, 5).double())


def test_sums_over_layers(tokens):
    model = models.build_gpt2(torch.float64)
    patterns, gradients = patterns_and_gradients(model, tokens, 7)
    allowed = torch.ones(6, 6).tril()
    product = sum((a * g).mean(1) for a, g in zip(patterns, gradients, strict=True))
    positive = sum((g.clamp(min=0) * allowed).mean(1) for g in gradients)
    gradient_attention = token_relevance(model, tokens, TARGET, method="gradient_attention")
    legrad = token_relevance(model, tokens, TARGET, method="legrad")
    raw = token_relevance(model, tokens, TARGET, method="raw_attention")
    torch.testing.assert_close(gradient_attention.matrix, product)
    torch.testing.assert_close(gradient_attention.scores, product.sum(1))
    torch.testing.assert_close(legrad.matrix, positive)
    torch.testing.assert_close(legrad.scores, positive.mean(1))
    torch.testing.assert_close(raw.scores, patterns[1].mean(1)[:, -1])
    for result in (gradient_attention, legrad, raw):
        torch.testing.assert_close(result.heads.sum((1, 2)), result.scores.sum(-1))


@pytest.mark.parametrize("method", CHAINS)
def test_heads_add_up_to_the_attention_part_of_each_layer(tokens, method):
    model = models.build_gpt2(torch.float64, n_layers=3)
    result = token_relevance(model, tokens, TARGET, method=method)
    layers, chain = result.layers, result.accumulation
    for layer in range(3):
        row = torch.zeros(2, 6, dtype=torch.float64)
        row[:, -1] = 1
        for above in range(2, layer, -1):
            row = torch.einsum("bt,bts->bs", row, layers[:, above])
        below = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
        for under in range(layer):
            below = layers[:, under] @ below
        attention = layers[:, layer] - torch.diag_embed(chain.steps[layer].kept)
        part = torch.einsum("bt,bts,bsu->b", row, attention, below)
        assert part.abs().min() > 1e-6
        torch.testing.assert_close(result.heads[:, layer].sum(-1), part, rtol=1e-10, atol=1e-12)
        alone = torch.einsum("bt,bhts,bsu->bh", row, chain.steps[layer].parts, below)
        torch.testing.assert_close(result.heads[:, layer], alone, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.scores, result.matrix[:, -1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing_and_gets_exactly_zero(gpt2, method, side):
    short, long = models.random_tokens(1, 4, seed=3), models.random_tokens(1, 6, seed=4)
    filler, n = torch.zeros(1, 2, dtype=torch.long), [0, 0, 1, 1, 1, 1] if side == "left" else [1, 1, 1, 1, 0, 0]
    padded = torch.cat([filler, short] if side == "left" else [short, filler], 1)
    mask = torch.tensor([n, [1] * 6])
    rules = "attnlrp" if method == "weighted_accumulation" else "gradient"
    both = token_relevance(gpt2, torch.cat([padded, long]), TARGET, method=method, rules=rules, attention_mask=mask)
    alone = token_relevance(gpt2, short, TARGET, method=method, rules=rules)
    other = token_relevance(gpt2, long, TARGET, method=method, rules=rules)
    real = mask[0].bool()
    assert (both.scores[0, ~real] == 0).all()
    assert (both.matrix[0, ~real] == 0).all() and (both.matrix[0, :, ~real] == 0).all() and (both.layers[0, :, :, ~real] == 0).all()
    torch.testing.assert_close(both.scores[0, real], alone.scores[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.matrix[0][real][:, real], alone.matrix[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both.scores[1], other.scores[0], rtol=1e-4, atol=1e-5)
    if method != "attention_flow":
        torch.testing.assert_close(both.heads[0], alone.heads[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.heads[1], other.heads[0], rtol=1e-4, atol=1e-5)


def test_the_explained_row_is_the_one_the_target_reads(gpt2, tokens):
    middle = token_relevance(gpt2, tokens, logit(7, position=2), method="chefer")
    assert middle.explained[:, 2].eq(1).all() and middle.explained.sum() == 2
    assert (middle.scores[:, 3:] == 0).all() and (middle.scores[:, :3] > 0).all()
    two = token_relevance(gpt2, tokens, lambda logits: logits[:, 2, 7] + logits[:, 4, 7], method="rollout")
    torch.testing.assert_close(two.scores, two.matrix[:, [2, 4]].mean(1))


def test_native_models_run_what_needs_most(native, tokens):
    for method in ("weighted_accumulation", "globenc"):
        result = token_relevance(native, tokens, TARGET, method=method, rules="relp")
        assert torch.isfinite(result.scores).all() and result.scores.abs().sum() > 0, method


def test_trained_model_looks_at_the_name(stories):
    prompt = "Once upon a time, there was a little girl named Lily. Lily was very happy because"
    result = token_relevance(stories, prompt, logit_diff("she", "he"))
    best = divmod(int(result.heads[0].argmax()), result.heads.shape[2])
    assert best in {(4, 0), (4, 2)}  # which activation patching finds too
    frame = result.to_frame()
    assert list(frame.columns) == ["example", "position", "token", "score"] and len(frame) == result.scores.shape[1]


def test_model_is_left_as_it_was(gpt2, tokens):
    before = {name: parameter.requires_grad for name, parameter in gpt2.named_parameters()}
    token_relevance(gpt2, tokens, TARGET, rules="attnlrp")
    assert {name: parameter.requires_grad for name, parameter in gpt2.named_parameters()} == before
    assert not any(point.fwd_hooks or point.bwd_hooks for point in gpt2.hook_dict.values())


def test_llama_in_float64(tokens):
    with no_upcasts():
        model = models.build_llama(torch.float64)
        expected = chefer_2021b(*patterns_and_gradients(model, tokens, 7))
        found = token_relevance(model, tokens, TARGET, importance="equal")
    torch.testing.assert_close(found.matrix, expected, rtol=0, atol=1e-12)


def test_bad_input(gpt2, tokens):
    for arguments, message in [
        (dict(method="attention"), "unknown method 'attention'; choose one of weighted_accumulation"),
        (dict(importance="size"), "unknown importance 'size'; choose one of relevance, norm"),
        (dict(rules="deeplift"), "'deeplift' compares two runs and token relevance explains one"),
        (dict(rules="lrp"), "unknown ruleset 'lrp'"),
        (dict(attention_mask=torch.ones(2, 5, dtype=torch.long)), r"attention_mask has shape \(2, 5\), the tokens \(2, 6\)"),
    ]:
        with pytest.raises(RelevanceError, match=message):
            token_relevance(gpt2, tokens, TARGET, **arguments)
    with pytest.raises(RelevanceError, match="one set of tokens and no cross-attention"):
        _ = token_relevance(gpt2, tokens, TARGET).across
    with pytest.raises(RelevanceError, match="encoder, decoder.*this model has one"):
        token_relevance(gpt2, {"encoder": tokens, "decoder": tokens}, TARGET)
    with pytest.raises(RelevanceError, match="attention_flow has no per-head parts"):
        _ = token_relevance(gpt2, tokens, TARGET, method="attention_flow").heads
    with pytest.raises(RelevanceError, match="reads no position"):
        token_relevance(gpt2, tokens, logit_diff(7, 7), method="chefer")


def test_a_delegated_attention_has_patterns_too(tokens):
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    found = token_relevance(models.bridge_from_config(GPTJForCausalLM, config), tokens, TARGET, method="rollout")
    torch.testing.assert_close(found.matrix.sum(-1), torch.ones(found.matrix.shape[:2]))


def test_a_model_without_live_patterns_is_refused(tokens, monkeypatch):
    monkeypatch.setattr("lens_relevance.sites.delegated_attention.ATTENTION", {})
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4, rotary_dim=4)
    model = models.bridge_from_config(GPTJForCausalLM, config)
    with pytest.raises(CoverageError, match="GPTJForCausalLM has no live attention pattern .*blocks.0.attn.hook_pattern.*propagate"):
        token_relevance(model, tokens, TARGET)
