"""More families: the forward stays bit-identical, the account closes, the pair rules are complete."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

from lens_relevance import CoverageError, coverage, propagate
from tests.engine.families import RULESETS, TARGET, close, inputs_and_reference, reference_for, unexplained, whole
from tests.models import VOCAB_SIZE, bridge_from_config
from tests.precision import no_upcasts
from tests.wider_models import WIDER, build_wider


@pytest.mark.parametrize("family", WIDER)
def test_every_ruleset_conserves_and_leaves_the_forward_alone(family: str) -> None:
    model, (tokens, other) = build_wider(family), inputs_and_reference()
    with torch.no_grad():
        logits = model(tokens)
    for rules in RULESETS:
        cache = propagate(model, tokens, TARGET, rules, reference=reference_for(rules, other), audit=True)
        assert torch.equal(cache.logits, logits), rules
        assert unexplained(cache) < 1e-5, rules
        assert float(cache.tokens().abs().sum()) > 0
    if family in ("mixtral", "qwen3_moe"):
        return  # complete together with the sink `router`: see below
    with no_upcasts():
        cache = propagate(model, tokens, TARGET, "deeplift", reference=other)
    close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 3), 1e-9)


@pytest.mark.parametrize("family", WIDER)
def test_coverage_proves_every_site_live(family: str) -> None:
    found = coverage(build_wider(family, torch.float32), ["attnlrp", "deeplift"])
    assert not found.uncovered
    assert found.rulesets["works"].all(), found.rulesets
    assert found.sites["live"].all(), found.sites.loc[~found.sites["live"]]


def test_a_delegated_attention_with_padding_equals_the_unpadded_run() -> None:
    """The mask of a delegated attention is rebuilt from the module's call; BERT sees both sides, so padding would show."""
    model, (tokens, other) = build_wider("bert", torch.float32), inputs_and_reference()
    short, other = tokens[:1, :4], other[:1, :4]
    padded, padded_other = (torch.cat([t, torch.full((1, 2), 9)], 1) for t in (short, other))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    for rules in ("attnlrp", "cp_lrp", "relp", "deeplift"):
        alone = propagate(model, short, TARGET, rules, reference=reference_for(rules, other))
        together = propagate(model, padded, TARGET, rules, reference=reference_for(rules, padded_other), attention_mask=mask)
        close(together.tokens()[:, :4], alone.tokens(), 1e-4)
        assert float(together.tokens()[:, 4:].abs().max()) == 0


def test_experts_chosen_differently_are_a_named_sink() -> None:
    """The choice itself is not a difference that can be passed on; where both runs choose alike the pair rules are complete."""
    model, (tokens, other) = build_wider("mixtral"), inputs_and_reference()
    with no_upcasts():
        account = propagate(model, tokens, TARGET, "deeplift", reference=other, audit=True).conservation()
        near = propagate(model, tokens, TARGET, "deeplift", reference=_nearby(model, tokens), audit=True)
    assert account["router"].abs().max() > 1e-3 and account["unexplained"].abs().max() < 1e-9
    assert near.conservation()["router"].abs().max() == 0
    close(near.residual().sum(1), whole(near).unsqueeze(1).expand(-1, 3), 1e-9)


def _nearby(model: TransformerBridge, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings close enough to the tokens' own that every router chooses the same experts."""
    table = model.W_E.detach()[tokens]
    noise = torch.randn(table.shape, dtype=table.dtype, generator=torch.Generator().manual_seed(0))
    return table + 1e-3 * noise


def test_what_has_no_site_is_refused_by_name() -> None:
    config = transformers.GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=4,
    )
    model = bridge_from_config(transformers.GptOssForCausalLM, config)
    with pytest.raises(CoverageError, match="blocks.0.*sinks"):
        propagate(model, inputs_and_reference()[0], TARGET, "attnlrp")
    found = coverage(model, ["attnlrp"])
    assert not found.rulesets["works"].any() and {"blocks.0.attn", "blocks.0.mlp"} <= set(found.uncovered)
