"""Relevance of whole models against LRP written out by hand (explicit_lrp.py), to 1e-9 in float64."""

from __future__ import annotations

import pytest
import torch

from lens_relevance import logit_diff, propagate
from tests.engine import explicit_lrp
from tests.engine.families import close
from tests.models import build_gpt2, build_llama, random_tokens
from tests.precision import no_upcasts
from tests.wider_models import build_wider

ANSWER, WRONG = 7, 11
RULES = pytest.mark.parametrize("rules", ["attnlrp", "cp_lrp"])


def compare(explained: list[explicit_lrp.Explained], cache: object, names: list[str]) -> None:
    for name in names:
        close(cache[name], torch.stack([one.relevance[name] for one in explained]), 1e-9)  # type: ignore[index]


@RULES
def test_gpt2(rules: str) -> None:
    model, tokens = build_gpt2(dtype=torch.float64), random_tokens(pos=7)
    weights, eps = model.original_model.state_dict(), model.original_model.config.layer_norm_epsilon
    weights = {name.replace("._original_component", ""): value for name, value in weights.items()}
    explained = [explicit_lrp.gpt2(weights, row, 2, 4, eps, rules, ANSWER, WRONG) for row in tokens]
    names = sorted({n for n, r in explained[0].relevance.items() if r.abs().max() > 0})
    cache = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules=rules, names_filter=names)
    close(cache.logits, torch.stack([one.logits[-1:] for one in explained]), 1e-12)
    assert {"embed.hook_out", "pos_embed.hook_out", "blocks.1.attn.o.hook_in", "blocks.0.mlp.out.hook_in"} <= set(names)
    compare(explained, cache, names)
    default = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules=rules)
    compare(explained, default, list(default))


@RULES
def test_llama(rules: str) -> None:
    with no_upcasts():
        model, tokens = build_llama(dtype=torch.float64), random_tokens(pos=7)
        config = model.original_model.config
        weights = {name.replace("._original_component", ""): value for name, value in model.original_model.state_dict().items()}
        frequencies = model.original_model.model.rotary_emb.inv_freq.tolist()
        assert frequencies == pytest.approx([config.rope_parameters["rope_theta"] ** (-2 * i / 4) for i in range(2)], rel=1e-6)
        explained = [explicit_lrp.llama(weights, row, 2, 4, 2, config.rms_norm_eps, frequencies, rules, ANSWER, WRONG) for row in tokens]
        names = sorted({n for n, r in explained[0].relevance.items() if r.abs().max() > 0})
        cache = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules=rules, names_filter=names)
        close(cache.logits, torch.stack([one.logits[-1:] for one in explained]), 1e-12)
        default = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules=rules)
    assert {"embed.hook_out", "blocks.1.attn.o.hook_in", "blocks.0.mlp.out.hook_in"} <= set(names)
    compare(explained, cache, names)
    compare(explained, default, list(default))


@RULES
def test_mixtral(rules: str) -> None:
    """Experts and router; the experts' neurons have no HookPoint, so their share shows at the MLP's input."""
    with no_upcasts():
        model, tokens = build_wider("mixtral"), random_tokens(pos=7)
        config = model.original_model.config
        weights = {name.replace("._original_component", ""): value for name, value in model.original_model.state_dict().items()}
        frequencies = model.original_model.model.rotary_emb.inv_freq.tolist()
        explained = [
            explicit_lrp.llama(weights, row, 2, 4, 2, config.rms_norm_eps, frequencies, rules, ANSWER, WRONG, config.num_experts_per_tok)
            for row in tokens
        ]
        names = sorted({n for n, r in explained[0].relevance.items() if r.abs().max() > 0})
        cache = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules=rules, names_filter=names)
        close(cache.logits, torch.stack([one.logits[-1:] for one in explained]), 1e-12)
    at = {
        "embed.hook_out",
        "blocks.1.hook_out",
        "blocks.0.hook_in",
        "blocks.0.mlp.hook_in",
        "blocks.1.mlp.hook_out",
        "blocks.0.attn.o.hook_in",
    }
    qkv = {f"blocks.1.attn.{part}.hook_out" for part in ("qkv" if rules == "attnlrp" else "v")}
    assert at | qkv <= set(names)
    compare(explained, cache, names)


def test_what_cp_lrp_cuts_gets_nothing() -> None:
    model, tokens = build_gpt2(dtype=torch.float64), random_tokens()
    cache = propagate(model, tokens, logit_diff(ANSWER, WRONG), rules="cp_lrp", names_filter=lambda name: name.endswith("q.hook_out"))
    for i in (0, 1):
        assert cache[f"blocks.{i}.attn.q.hook_out"].abs().max() == 0
