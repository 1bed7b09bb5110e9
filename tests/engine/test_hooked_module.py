"""Models without an adapter, with HookPoints at everything they call: ALBERT, Whisper, and a Llama held against its bridge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from analyses.known_roles.albert import hooked_albert
from analyses.known_roles.whisper import hooked_decoder, hooked_whisper
from lens_relevance import CoverageError, RelevanceError, attach, continuation, coverage, logit_diff, propagate, rulesets, token_relevance
from lens_relevance.ruleset_tables import needs_reference
from lens_relevance.sites import HookedModule, declare_sites, gated_activation, sharing_copies
from tests.engine.families import RULESETS, close, unexplained
from tests.hooked_models import build_albert, build_whisper, sounds
from tests.models import build_llama, random_tokens, randomize
from tests.precision import no_upcasts

TARGET = logit_diff(3, 4)
TOKENS = random_tokens(pos=7, vocab_size=30)
OTHER = TOKENS.clone()
OTHER[:, 2], OTHER[:, 5] = 4, 9
LAYERS = "albert.encoder.albert_layer_groups"


def _albert() -> tuple[HookedModule, Any, Any]:
    return hooked_albert(build_albert(), TOKENS), TOKENS, OTHER


def _whisper() -> tuple[HookedModule, Any, Any]:
    return hooked_whisper(build_whisper(), sounds()["input_features"]), sounds(), sounds(1)


BUILDERS = {"albert": _albert, "whisper": _whisper}


@pytest.mark.parametrize("rules", RULESETS)
@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_ruleset_is_accounted_for_at_every_layer(name: str, rules: str) -> None:
    model, inputs, other = BUILDERS[name]()
    cache = propagate(model, inputs, TARGET, rules=rules, reference=other if needs_reference(rulesets()[rules]) else None, audit=True)
    assert float(cache.value.abs().min()) > 1e-2
    assert unexplained(cache) < 1e-11
    if rules == "deeplift":
        assert cache.reference_value is not None
        relevance = torch.tensor(cache.conservation()["relevance"].to_numpy()).reshape(2, -1)
        difference = (cache.value - cache.reference_value).unsqueeze(1)
        assert float(difference.abs().min()) > 1e-2
        close(relevance, difference.expand_as(relevance), 1e-10)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_cp_lrp_conserves_without_biases(name: str) -> None:
    model, inputs, _ = BUILDERS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
    cache = propagate(model, inputs, TARGET, rules="cp_lrp")
    stacks = [stack for stack, names in cache.stacks.items() if names["embeddings"]]
    tokens = torch.stack([cache.tokens(stack=stack).sum(1) for stack in stacks]).sum(0)
    assert float(cache.value.abs().min()) > 1e-2
    close(tokens, cache.value, 1e-10)


@torch.no_grad()
def test_the_model_computes_what_it_did() -> None:
    albert, whisper, heard = build_albert(), build_whisper(), sounds()
    logits, states, written = albert(TOKENS).logits, whisper.model.encoder(heard["input_features"])[0], whisper(**heard).logits
    close(hooked_albert(albert, TOKENS)(TOKENS), logits, 1e-12)
    close(hooked_whisper(whisper, heard["input_features"])(**heard), written, 1e-12)
    decoder = hooked_decoder(build_whisper(), states)
    close(decoder(input_features=states, decoder_input_ids=heard["decoder_input_ids"]), written, 1e-12)


def test_a_decoder_alone_has_the_relevance_it_has_in_the_whole_model() -> None:
    heard, other, point = sounds(), sounds(1), "model.decoder.layers.1.encoder_attn.hook_z"
    whole = propagate(hooked_whisper(build_whisper(), heard["input_features"]), heard, TARGET, rules="deeplift", reference=other)
    model = build_whisper()
    with torch.no_grad():
        states, silent = (model.model.encoder(x["input_features"])[0] for x in (heard, other))
    given, against = ({"input_features": x, "decoder_input_ids": heard["decoder_input_ids"]} for x in (states, silent))
    alone = propagate(hooked_decoder(model, states), given, TARGET, rules="deeplift", reference=against, audit=True)
    close(alone[point], whole[point], 1e-10)
    close(alone.heads(stack="cross"), whole.heads(stack="cross"), 1e-10)
    assert alone.heads(stack="cross").shape == (2, 5, 3, 4) and unexplained(alone) < 1e-11


def test_heads_are_parts_of_what_attention_gives() -> None:
    """By the closed form of a head's relevance, A v . g."""
    model, inputs, _ = _albert()
    inner = f"{LAYERS}.2.albert_layers.0.attention"
    names = [f"{inner}.{name}" for name in ("hook_pattern", "hook_v", "hook_z")]
    cache = propagate(model, inputs, TARGET, rules="attnlrp", names_filter=names)
    pattern, v, z = (cache.activations[name] for name in names)
    close(z, (pattern @ v).transpose(1, 2), 1e-12)
    by_head = torch.einsum("bhts,bhsd,bthd->bth", pattern, v, cache.coefficients[names[2]])
    assert by_head.abs().max() > 1e-3
    close(propagate(model, inputs, TARGET, rules="attnlrp").heads()[:, :, 2], by_head, 1e-12)


def test_copies_share_parameters_and_nothing_else() -> None:
    layer = build_albert().albert.encoder.albert_layer_groups[0]
    copies = sharing_copies(layer, 3)
    assert {id(p) for p in copies.parameters()} == {id(p) for p in layer.parameters()}
    assert len({id(module) for module in copies.modules()}) == 1 + 3 * len(list(layer.modules()))
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    assert all(torch.equal(one(x), layer(x)) for one in copies)


def test_a_layer_called_again_and_again_is_refused_as_it_is() -> None:
    model = HookedModule(build_albert(n_layers=3), {"input_ids": TOKENS})
    with pytest.raises(RelevanceError, match=r"albert_layers\.0.* is called 3 times in one forward.*sharing_copies"):
        model.sites()


def test_padding_changes_nothing() -> None:
    model, tokens, _ = _albert()
    alone = propagate(model, tokens[:1, :5], TARGET, rules="attnlrp")
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, 5:] = 0
    padded = propagate(model, tokens, TARGET, rules="attnlrp", attention_mask=mask)
    close(padded.tokens()[0, :5], alone.tokens()[0], 1e-10)
    close(padded.heads()[0, :5], alone.heads()[0], 1e-10)
    assert padded.tokens()[0, 5:].abs().max() == 0


def test_gradient_tools_and_token_relevance_work() -> None:
    model, inputs, _ = _whisper()
    gradients: dict[str, Tensor] = {}
    point = "model.decoder.layers.0.encoder_attn.hook_z"
    hook = (point, lambda gradient, hook: gradients.update(z=gradient.clone()))
    with attach(model, "attnlrp"), model.hooks(bwd_hooks=[hook]):
        logits = model(**inputs)
        (logits[:, -1, 3] - logits[:, -1, 4]).sum().backward()
    close(gradients["z"].unflatten(-1, (4, 4)), propagate(model, inputs, TARGET, rules="attnlrp").coefficients[point], 1e-12)
    for method in ("weighted_accumulation", "chefer_2021b", "rollout"):
        found = token_relevance(model, inputs, TARGET, method=method)
        assert found.heads.shape == (2, 8, 4) and found.scores["encoder"].shape == (2, 9)  # type: ignore[index]
    spoken = propagate(model, inputs, continuation([[5, 6, 7], [8, 9, 10]]), rules="relp", audit=True)
    assert spoken.tokens(stack="decoder").shape == (2, 7) and unexplained(spoken) < 1e-11


def test_coverage_takes_it() -> None:
    model, inputs, _ = _whisper()
    found = coverage(model, inputs=inputs)
    assert found.rulesets["works"].equals(found.rulesets["applies"]) and found.rulesets["works"].sum() >= len(RULESETS)
    assert found.sites["live"].all() and found.sites["off"].max() < 1e-12


def _hooked_llama() -> HookedModule:
    """The Llama of `build_llama` without a bridge; its gates are declared by hand."""
    model = transformers.LlamaForCausalLM(build_llama().original_model.config)
    randomize(model, 0)
    hooked = HookedModule(model.double().eval(), {"input_ids": TOKENS})
    blocks = [f"model.layers.{i}" for i in range(2)]
    sites = [site for site in hooked.sites({"model.layers": "blocks"}) if not site.name.endswith("act_fn")]
    for i, block in enumerate(blocks):
        gate, up, out = (f"{block}.mlp.{name}" for name in ("gate_proj.hook_out", "up_proj.hook_out", "down_proj.hook_in"))
        sites += gated_activation(f"blocks.{i}.mlp", gate, up, hook_out=out, function=torch.nn.functional.silu)
    stream = [*(f"{block}.hook_in" for block in blocks), f"{blocks[-1]}.hook_out"]
    z = [f"{block}.self_attn.hook_z" for block in blocks]
    declare_sites(hooked, sites, embeddings=["model.embed_tokens.hook_out"], residual=stream, z=z)
    return hooked


@pytest.mark.parametrize("rules", RULESETS)
def test_a_llama_has_the_relevance_that_its_bridge_has(rules: str) -> None:
    """Grouped queries, rotary positions, RMS norms and gates: with no adapter, and with TransformerLens's."""
    with no_upcasts():
        reference = OTHER if needs_reference(rulesets()[rules]) else None
        mine, its = (
            propagate(model, TOKENS, TARGET, rules=rules, reference=reference, audit=True)
            for model in (_hooked_llama(), build_llama(dtype=torch.float64))
        )
    assert float(its.tokens().abs().max()) > 1e-2
    for found, expected in ((mine.tokens(), its.tokens()), (mine.residual(), its.residual()), (mine.heads(), its.heads())):
        close(found, expected, 1e-10)
    assert unexplained(mine) < 1e-10


def test_what_it_cannot_reach_is_refused() -> None:
    gemma = transformers.Gemma2Config(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        attn_logit_softcapping=0.5,
        query_pre_attn_scalar=1,
        attn_implementation="eager",
    )
    model = transformers.Gemma2ForCausalLM(gemma).eval()
    randomize(model, 0)
    with torch.no_grad():
        logits, modules = model(TOKENS).logits, [*model.named_modules()]
    with pytest.raises(CoverageError, match="a step besides"):
        HookedModule(model, {"input_ids": TOKENS})
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, logits) and [*model.named_modules()] == modules and model.config.use_cache
    assert not any("attention_geometry" in vars(module) or module._forward_hooks for module in model.modules())
    t5 = transformers.T5Config(vocab_size=30, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0)
    with pytest.raises(CoverageError, match="a step besides"):
        HookedModule(transformers.T5ForConditionalGeneration(t5).eval(), {"input_ids": TOKENS, "decoder_input_ids": TOKENS})
    deberta = transformers.DebertaV2Config(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(CoverageError, match="does not go through transformers' attention interface"):
        HookedModule(transformers.DebertaV2ForMaskedLM(deberta).eval(), {"input_ids": TOKENS})
    with pytest.raises(RelevanceError, match="train mode"):
        HookedModule(build_albert().train(), {"input_ids": TOKENS})
