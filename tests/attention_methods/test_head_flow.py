"""Relevance flow of heads: rows and columns add up to the relevance that propagate gives z and the keys."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from lens_relevance import RelevanceError, logit, mean_embedding, propagate, random_tokens
from lens_relevance.attention_methods import head_flow
from tests import models
from tests.precision import no_upcasts
from tests.wider_models import build_wider

TARGET = logit(7)
SINGLE = ["gradient", "attnlrp", "cp_lrp", "gim"]


def build(family: str):
    if family == "gemma2":
        sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
        config = Gemma2Config(**sizes, head_dim=4, query_pre_attn_scalar=4, attn_logit_softcapping=2.0)
        return models.bridge_from_config(Gemma2ForCausalLM, config, torch.float64)
    if family == "native":
        return models.build_native(torch.float64, n_key_value_heads=2, positional_embedding_type="rotary", rotary_dim=4)
    return {"gpt2": models.build_gpt2, "neox": models.build_neox, "llama": models.build_llama}[family](dtype=torch.float64)


# Every ruleset where the code has branches of its own (soft-cap, fused softmax, rotation inside the attention), the main ones elsewhere.
CASES = [(family, rules) for family in ("gemma2", "native") for rules in (*SINGLE, "deeplift")]
CASES += [("gpt2", "attnlrp"), ("gpt2", "deeplift"), ("neox", "gim"), ("neox", "deeplift"), ("llama", "attnlrp"), ("llama", "deeplift")]
KEYS = {"llama": "attn.hook_rot_k", "gemma2": "attn.hook_rot_k"}


def runs(family: str, rules: str, tokens: torch.Tensor):
    reference = models.random_tokens(seed=9) if rules.startswith("deeplift") else None
    keys = [f"blocks.{i}.{KEYS.get(family, 'attn.k.hook_out')}" for i in range(2)]
    with no_upcasts():
        model = build(family)
        names = [f"blocks.{i}.attn.hook_z" for i in range(2)] + ([] if rules == "cp_lrp" else keys)
        cache = propagate(model, tokens, TARGET, rules=rules, names_filter=names, reference=reference)
        values = head_flow(model, tokens, TARGET, rules=rules, reference=reference)
        key = head_flow(model, tokens, TARGET, rules=rules, path="key", reference=reference) if rules != "cp_lrp" else None
    return cache, values, key, keys


@pytest.mark.parametrize(("family", "rules"), CASES)
def test_rows_are_the_heads_relevance_and_columns_that_of_the_keys(family, rules, tokens):
    cache, values, key, keys = runs(family, rules, tokens)
    heads = cache.heads().permute(0, 2, 3, 1)
    assert heads.abs().max() > 1e-3
    torch.testing.assert_close(values.sum(-1), heads, rtol=1e-9, atol=1e-11)
    assert (values.triu(1) == 0).all() and values.abs().max() > 1e-3
    if key is None:
        return
    for layer, name in enumerate(keys):
        expected = cache[name].sum(-1)  # [batch, pos, kv_head]
        found = key[:, layer].sum(-2).unflatten(1, (expected.shape[-1], -1)).sum(2).mT
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


def test_layers_padding_and_defaults(gpt2):
    tokens, mask = models.random_tokens(), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    for path in ("value", "key"):
        flow = head_flow(gpt2, tokens, TARGET, path=path, layers=[1], attention_mask=mask)
        alone = head_flow(gpt2, tokens[:1, 2:], TARGET, path=path)
        assert flow.shape == (2, 1, 4, 6, 6)
        assert (flow[0, :, :, :2] == 0).all() and (flow[0, :, :, :, :2] == 0).all()
        torch.testing.assert_close(flow[0, 0, :, 2:, 2:], alone[0, 1], rtol=1e-4, atol=1e-5)
    baseline = head_flow(gpt2, tokens, TARGET, reference=mean_embedding())
    cache = propagate(gpt2, tokens, TARGET, reference=mean_embedding())
    torch.testing.assert_close(baseline.sum(-1), cache.heads().permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    assert torch.equal(head_flow(gpt2, tokens, TARGET), baseline) and bool(baseline.any())


def test_bad_input(gpt2, tokens):
    with pytest.raises(RelevanceError, match="layer 2 is out of range: the model has 2 layers, 0 to 1"):
        head_flow(gpt2, tokens, TARGET, layers=[2])
    with pytest.raises(RelevanceError, match="holds 4; use mean_embedding"):
        head_flow(gpt2, tokens, TARGET, reference=random_tokens(4))


@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_keys_of_latent_attention_and_of_attention_with_a_sink(rules, tokens):
    other = models.random_tokens(seed=9) if rules == "deeplift" else None
    for family, point in (("deepseek_v3", "attn.hook_k"), ("gpt_oss", "attn.hook_rot_k")):
        names = [f"blocks.{i}.{point}" for i in range(2)]
        with no_upcasts():
            model = build_wider(family)
            cache = propagate(model, tokens, TARGET, rules=rules, names_filter=names, reference=other)
            flow = head_flow(model, tokens, TARGET, rules=rules, path="key", reference=other)
        for layer, name in enumerate(names):
            at_keys = cache[name].sum(-1) if family == "deepseek_v3" else cache[name].sum(-1).mT  # [batch, kv_head, pos]
            found = flow[:, layer].sum(-2).unflatten(1, (at_keys.shape[1], -1)).sum(2)
            assert at_keys.abs().max() > 1e-6
            torch.testing.assert_close(found, at_keys, rtol=1e-7, atol=1e-10)
