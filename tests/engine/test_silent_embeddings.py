"""Relevance ends at the embeddings: where their HookPoints do not fire there is an error, where the model scales them all is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lens_relevance import LivenessError, MismatchError, propagate
from tests.engine.families import RULESETS, TARGET, close, inputs_and_reference, reference_for, unexplained
from tests.engine.test_liveness import rewire
from tests.models import build_gpt2
from tests.precision import no_upcasts
from tests.wider_models import build_wider

TOKENS, OTHER = inputs_and_reference()


@pytest.mark.parametrize("rules", RULESETS)
def test_a_model_that_scales_its_embeddings_and_what_it_adds_to_the_stream(rules: str) -> None:
    """Granite's multipliers: TransformerLens calls a scaled HookPoint only if it says that it has hooks."""
    with no_upcasts():
        model = build_wider("granite")
        with torch.no_grad():
            logits = model(TOKENS)
        names = ["embed.hook_out", "blocks.0.hook_in", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"]
        asked, reference = [*names, "unembed.hook_out"], reference_for(rules, OTHER)
        cache = propagate(model, TOKENS, TARGET, rules=rules, names_filter=asked, reference=reference, audit=True)
    assert torch.equal(cache.logits, logits)
    assert unexplained(cache) < 1e-9
    close(cache.tokens(), cache["blocks.0.hook_in"].sum(-1), 1e-12)
    embedded = model.W_E.detach()[TOKENS] * 12
    close(cache.activations["embed.hook_out"], embedded, 1e-12)
    for name in names[2:]:
        assert float(cache[name].abs().max()) > 0


def test_an_embedding_whose_hook_point_does_not_fire_is_an_error() -> None:
    model = build_gpt2()
    embed: Any = model.embed

    def forward(ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return embed.original_component(ids)

    rewire(embed, forward)
    with pytest.raises(LivenessError, match="embed.hook_out did not fire"):
        propagate(model, TOKENS, TARGET, rules="attnlrp", check=False)
    with pytest.raises(MismatchError, match="blocks.0.hook_in is not linear"):  # found before the forward ends
        propagate(model, TOKENS, TARGET, rules="attnlrp")
