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
from tests.wider_models import MIXTURES, WIDER, build_wider


@pytest.mark.parametrize("family", WIDER)
def test_every_ruleset_conserves_and_leaves_the_forward_alone(family: str) -> None:
    model, (tokens, other) = build_wider(family), inputs_and_reference()
    with torch.no_grad():
        logits = model(tokens)
    for rules in RULESETS:
        asked = ["embed.hook_out", "unembed.hook_out"]
        cache = propagate(model, tokens, TARGET, rules=rules, reference=reference_for(rules, other), names_filter=asked, audit=True)
        assert torch.equal(cache.logits, logits), rules
        assert unexplained(cache) < 1e-5, rules
        assert float(cache.tokens().abs().sum()) > 0
    if family in MIXTURES:
        return  # complete together with the sink `router`: see below
    with no_upcasts():
        cache = propagate(model, tokens, TARGET, rules="deeplift", reference=other)
    close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 3), 1e-9)


@torch.no_grad()
def _zero_all_that_keeps(model: TransformerBridge) -> None:
    """All biases and learned positions, under whatever name."""
    for name, parameter in model.original_model.named_parameters():
        if name.endswith("bias") or any(word in name for word in ("wpe", "position", "token_type")):
            parameter.zero_()


@pytest.mark.parametrize("family", WIDER)
def test_cp_lrp_conserves_without_biases_and_positions(family: str) -> None:
    with no_upcasts():
        model = build_wider(family)
        _zero_all_that_keeps(model)
        cache = propagate(model, inputs_and_reference()[0], TARGET, rules="cp_lrp")
    close(cache.tokens().sum(1), cache.value, 1e-9)
    close(cache.residual().sum(1), cache.value.unsqueeze(1).expand(-1, 3), 1e-9)


@pytest.mark.parametrize("family", WIDER)
def test_coverage_proves_every_site_live(family: str) -> None:
    found = coverage(build_wider(family, torch.float32), ["attnlrp", "deeplift"])
    assert not found.uncovered
    assert found.rulesets["works"].equals(found.rulesets["applies"]), found.rulesets
    assert found.sites["live"].all(), found.sites.loc[~found.sites["live"]]
    assert not found.sites["off"].isna().any() and found.sites["off"].max() < 1e-5


def test_a_delegated_attention_with_padding_equals_the_unpadded_run() -> None:
    """The mask of a delegated attention is rebuilt from the module's call; BERT sees both sides, so padding would show."""
    model, (tokens, other) = build_wider("bert", torch.float32), inputs_and_reference()
    short, other = tokens[:1, :4], other[:1, :4]
    padded, padded_other = (torch.cat([t, torch.full((1, 2), 9)], 1) for t in (short, other))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    for rules in ("attnlrp", "cp_lrp", "relp", "deeplift"):
        alone = propagate(model, short, TARGET, rules=rules, reference=reference_for(rules, other))
        together = propagate(model, padded, TARGET, rules=rules, reference=reference_for(rules, padded_other), attention_mask=mask)
        close(together.tokens()[:, :4], alone.tokens(), 1e-4)
        assert float(together.tokens()[:, 4:].abs().max()) == 0


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_chosen_differently_are_a_named_sink(family: str) -> None:
    """The choice itself is not a difference that can be passed on; where both runs choose alike the pair rules are complete."""
    model, (tokens, other) = build_wider(family), inputs_and_reference()
    with no_upcasts():
        account = propagate(model, tokens, TARGET, rules="deeplift", reference=other, audit=True).conservation()
        near = propagate(model, tokens, TARGET, rules="deeplift", reference=_nearby(model, tokens), audit=True)
    assert account["router"].abs().max() > 1e-3 and account["unexplained"].abs().max() < 1e-9
    assert near.conservation()["router"].abs().max() == 0
    close(near.residual().sum(1), whole(near).unsqueeze(1).expand(-1, 3), 1e-9)


def _nearby(model: TransformerBridge, tokens: torch.Tensor) -> torch.Tensor:
    """Embeddings close enough to the tokens' own that every router chooses the same experts."""
    table = model.W_E.detach()[tokens]
    noise = torch.randn(table.shape, dtype=table.dtype, generator=torch.Generator().manual_seed(0))
    return table + 1e-3 * noise


def test_what_has_no_site_is_refused_by_name() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = bridge_from_config(transformers.MambaForCausalLM, config)
    with pytest.raises(CoverageError, match="blocks.0.*MambaLRP"):
        propagate(model, inputs_and_reference()[0], TARGET, rules="attnlrp")
    found = coverage(model, ["attnlrp"])
    assert not found.rulesets["works"].any() and "blocks.0.mixer" in found.uncovered


@pytest.mark.parametrize(
    "family, overrides, reason",
    [
        ("deepseek_v3", {"norm_topk_prob": False}, "blocks.1.mlp: router weights that do not sum to one"),
        ("qwen2_moe", {}, "blocks.0.mlp: how Qwen2MoeSparseMoeBlock routes to its experts is not known"),
    ],
)
def test_a_mixture_that_is_not_known_is_refused_by_name(family: str, overrides: dict[str, object], reason: str) -> None:
    with pytest.raises(CoverageError, match=reason):
        propagate(build_wider(family, torch.float32, **overrides), inputs_and_reference()[0], TARGET, rules="attnlrp")


def test_heads_of_latent_attention_are_laid_out_as_the_model_has_them() -> None:
    """TransformerLens takes z of 4 heads of 6 features for 6 heads of 4; a head whose output weights are zero shows where it is."""
    model, (tokens, _) = build_wider("deepseek_v3"), inputs_and_reference()
    with torch.no_grad():
        model.blocks[1].attn.o.original_component.weight.unflatten(1, (4, 6))[:, 2] = 0
    cache = propagate(model, tokens, TARGET, rules="attnlrp")
    assert cache.heads().shape == (2, 6, 2, 4)
    in_layer = cache.heads()[:, :, 1].abs().amax((0, 1))
    assert float(in_layer[2]) == 0 and float(in_layer[[0, 1, 3]].min()) > 0
    one = propagate(
        model, tokens, TARGET, rules="attnlrp", through={"blocks.1.attn.hook_z": {"head": [1]}}, names_filter="blocks.1.attn.hook_z"
    )
    coefficients = one.coefficients[one.canonical("blocks.1.attn.hook_z")]
    assert float(coefficients[:, :, [0, 2, 3]].abs().max()) == 0 and float(coefficients[:, :, 1].abs().max()) > 0
