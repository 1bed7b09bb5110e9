"""Attention as configs of released models have it: scales, soft-caps, sinks, rotation; and what is refused because no rule knows it.

The pair rules use the scores' own operands, scale and soft-cap, so that their relevance adds up only where
the sites say what the model computes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from analyses.benchmarks.tiny_models import build
from lens_relevance import CoverageError, propagate
from tests.engine.families import TARGET, close, inputs_and_reference, unexplained, whole
from tests.precision import no_upcasts

CONFIGURED: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 with scores over the layer's number": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True, n_layers=3)),
    "half of each head rotated": ("neox_parallel", {}),
    "a scale and soft-caps of its own": ("gemma2", {}),
    "a scale of its own": ("gemma3", dict(query_pre_attn_scalar=9)),
    "attention sinks": ("gpt_oss", {}),
}


@pytest.mark.parametrize("case", list(CONFIGURED))
def test_pair_rules_are_complete_in_every_layer(case: str) -> None:
    family, settings = CONFIGURED[case]
    tokens, reference = inputs_and_reference()
    with no_upcasts():
        cache = propagate(build(family, **settings), tokens, TARGET, reference=reference, audit=True)
    account = cache.conservation()
    assert whole(cache).abs().min() > 1e-3 and unexplained(cache) < 1e-9
    kept = account.drop(columns=["example", "layer", "value", "relevance", "unexplained", "router"])  # experts may be chosen differently
    assert kept.abs().to_numpy().max() < 1e-9


def test_the_number_of_the_layer_divides_its_scores() -> None:
    """The reading itself: layer 0 as without the setting, layer 1 at half."""
    tokens, _ = inputs_and_reference()
    names = [f"blocks.{i}.attn.{point}" for i in (0, 1) for point in ("q.hook_out", "k.hook_out", "hook_attn_scores")]
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    cache = propagate(model, tokens, TARGET, rules="gradient", names_filter=names)
    for i in (0, 1):
        q, k, scores = (cache.activations[name] for name in names[3 * i : 3 * i + 3])
        raw = torch.einsum("bthd,bshd->bhts", q, k) / 2 / (i + 1)
        seen = torch.ones(6, 6).tril().bool()
        close(scores[..., seen], raw[..., seen], 1e-12)


def test_an_activation_that_mixes_features_is_refused() -> None:
    model = build("llama", torch.float32)
    model.blocks[1].mlp.original_component.act_fn = torch.nn.Softmax(-1).eval()
    with pytest.raises(CoverageError, match="blocks.1.mlp: its activation mixes features"):
        propagate(model, inputs_and_reference()[0], TARGET, rules="attnlrp")


UNKNOWN = {
    "norms of queries and keys after the rotation": lambda attn: setattr(attn.config, "qk_norm_after_rope", True),
    "gated attention outputs": lambda attn: setattr(attn.config, "gated_q_proj", True),
    "queries, keys and values clamped by clip_qkv": lambda attn: setattr(attn.original_component.config, "clip_qkv", 8.0),
}


@pytest.mark.parametrize("step", list(UNKNOWN))
def test_steps_between_the_hook_points_that_no_rule_knows_are_refused(step: str) -> None:
    model = build("llama", torch.float32)
    UNKNOWN[step](model.blocks[1].attn)
    with pytest.raises(CoverageError, match=f"{step} are not supported"):
        propagate(model, inputs_and_reference()[0], TARGET, rules="attnlrp")
