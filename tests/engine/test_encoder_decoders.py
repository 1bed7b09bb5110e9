"""Encoder-decoders: an oracle for T5, conservation over the cuts of both stacks, completeness of the pair rules, padding, bad input."""

from __future__ import annotations

import pytest
import torch

from analyses.benchmarks.tiny_models import build as build_family
from lens_relevance import RelevanceCache, RelevanceError, continuation, coverage, latent, logit, mean_embedding, propagate, random_tokens
from lens_relevance.sites import anatomy
from tests.encoder_decoders import ENCODER_DECODERS, build_encoder_decoder, sources_and_targets
from tests.engine import explicit_t5
from tests.engine.families import RULESETS, TARGET, close, reference_for, unexplained, whole, zero_all_that_keeps
from tests.models import VOCAB_SIZE
from tests.precision import no_upcasts

FAMILY = pytest.mark.parametrize("family", ENCODER_DECODERS)


def cut_sums(cache: RelevanceCache, model: object) -> torch.Tensor:
    """Relevance summed over each complete cut, [batch, cut]."""
    cuts = anatomy(model).stacks.cuts
    return torch.stack([torch.stack([cache[name].flatten(1).sum(1) for name in cut.names]).sum(0) for cut in cuts], 1)


def all_cuts(model: object) -> list[str]:
    return list(dict.fromkeys(name for cut in anatomy(model).stacks.cuts for name in cut.names))


@pytest.mark.parametrize("rules", ["attnlrp", "cp_lrp"])
def test_t5_equals_lrp_written_out_by_hand(rules: str) -> None:
    with no_upcasts():
        model, (inputs, _) = build_encoder_decoder("t5"), sources_and_targets()
        config = model.original_model.config
        weights = {name.replace("._original_component", ""): value for name, value in model.original_model.state_dict().items()}
        far = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
        explained = [
            explicit_t5.t5(weights, source, target, 2, 4, config.layer_norm_epsilon, far, rules, 7, 11)
            for source, target in zip(inputs["input_ids"], inputs["decoder_input_ids"], strict=True)
        ]
        names = sorted({n for n, r in explained[0].relevance.items() if r.abs().max() > 0})
        cache = propagate(model, inputs, TARGET, rules=rules, names_filter=names)
    close(cache.logits, torch.stack([one.logits[-1:] for one in explained]), 1e-12)
    cross = {f"decoder_blocks.1.cross_attn.{point}" for point in ("v.hook_in", "v.hook_out", "o.hook_in")}
    if rules == "attnlrp":
        cross |= {f"decoder_blocks.0.cross_attn.{p}" for p in ("q.hook_out", "k.hook_in", "hook_pattern", "hook_attn_scores")}
    assert cross | {"encoder_blocks.0.hook_in", "decoder_blocks.0.hook_in", "encoder_ln_final.hook_out"} <= set(names)
    for name in names:
        close(cache[name], torch.stack([one.relevance[name] for one in explained]), 1e-9)


@FAMILY
def test_every_ruleset_conserves_over_every_cut_and_leaves_the_forward_alone(family: str) -> None:
    model, (inputs, other) = build_encoder_decoder(family), sources_and_targets()
    with torch.no_grad():
        logits = model(inputs["input_ids"], decoder_input=inputs["decoder_input_ids"])
    asked = {*all_cuts(model), "unembed.hook_out"}
    for rules in RULESETS:
        reference = other if reference_for(rules, logits) is not None else None
        cache = propagate(model, inputs, TARGET, rules=rules, reference=reference, names_filter=lambda name: name in asked, audit=True)
        assert torch.equal(cache.logits, logits), rules
        assert unexplained(cache) < 1e-5, rules
        assert all(float(cache.tokens(stack).abs().sum()) > 0 for stack in ("encoder", "decoder"))
    with no_upcasts():
        for rules in ("attnlrp", "deeplift"):
            cache = propagate(model, inputs, TARGET, rules=rules, reference=other if rules == "deeplift" else None, audit=True)
            assert unexplained(cache) < 1e-9


@FAMILY
@pytest.mark.parametrize("reference", ["other", "mean_embedding", "random_tokens"])
def test_deeplift_is_complete_at_every_cut(family: str, reference: str) -> None:
    model, (inputs, other) = build_encoder_decoder(family), sources_and_targets()
    given = {"other": other, "mean_embedding": mean_embedding(), "random_tokens": random_tokens(2)}[reference]
    with no_upcasts():
        cache = propagate(model, inputs, TARGET, rules="deeplift", reference=given, names_filter=all_cuts(model))
    sums = cut_sums(cache, model)
    if family == "bart":  # below the first block, the positions are the same in both runs
        assert "pos_embed.hook_out" not in cache
    close(sums, whole(cache).unsqueeze(1).expand_as(sums), 1e-9)


@FAMILY
def test_cp_lrp_conserves_at_the_tokens_without_biases(family: str) -> None:
    model, (inputs, _) = build_encoder_decoder(family), sources_and_targets()
    zero_all_that_keeps(model)
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if "embed_positions" in name:
                parameter.zero_()
    with no_upcasts():
        cache = propagate(model, inputs, logit(7), rules="cp_lrp")
    close(cache.tokens("encoder").sum(1) + cache.tokens("decoder").sum(1), cache.value, 1e-9)


@FAMILY
def test_padding_has_no_relevance_and_changes_none(family: str) -> None:
    model, (inputs, other) = build_encoder_decoder(family, torch.float32), sources_and_targets(batch=1)
    filler, ones = torch.full((1, 2), 9), torch.ones(1, 7, dtype=torch.long)
    mask = torch.cat([ones, torch.zeros(1, 2, dtype=torch.long)], 1)
    padded, padded_other = (
        {**one, "input_ids": torch.cat([one["input_ids"], filler], 1), "attention_mask": mask} for one in (inputs, other)
    )
    for rules in ("attnlrp", "cp_lrp", "relp", "deeplift"):
        pair = rules == "deeplift"
        alone = propagate(model, inputs, TARGET, rules=rules, reference=other if pair else None)
        together = propagate(model, padded, TARGET, rules=rules, reference=padded_other if pair else None)
        close(together.tokens("encoder")[:, :7], alone.tokens("encoder"), 1e-4)
        close(together.tokens("decoder"), alone.tokens("decoder"), 1e-4)
        close(together.heads("cross"), alone.heads("cross"), 1e-4)
        assert float(together.tokens("encoder")[:, 7:].abs().max()) == 0


def test_rows_of_a_batch_do_not_mix() -> None:
    """BART's decoder positions are one row for the whole batch."""
    model, (inputs, _) = build_encoder_decoder("bart"), sources_and_targets()
    together = propagate(model, inputs, TARGET, rules="attnlrp")
    for i in range(2):
        alone = propagate(model, {name: value[i : i + 1] for name, value in inputs.items()}, TARGET, rules="attnlrp")
        for stack in ("encoder", "decoder"):
            close(together.positions(stack)[i : i + 1], alone.positions(stack), 1e-9)
            close(together.residual(stack)[i : i + 1], alone.residual(stack), 1e-9)


@FAMILY
def test_coverage_proves_every_site_live(family: str) -> None:
    found = coverage(build_encoder_decoder(family, torch.float32), ["attnlrp", "deeplift"])
    assert not found.uncovered
    assert found.rulesets["works"].equals(found.rulesets["applies"]), found.rulesets
    assert found.sites["live"].all(), found.sites.loc[~found.sites["live"]]


def test_stacks_by_name() -> None:
    model, (inputs, _) = build_encoder_decoder("t5"), sources_and_targets()
    cache = propagate(model, inputs, TARGET)
    assert cache.tokens("encoder").shape == (2, 7) and cache.tokens("decoder").shape == (2, 4)
    assert cache.heads("encoder").shape == (2, 7, 2, 4) and cache.heads("cross").shape == cache.heads("decoder").shape == (2, 4, 2, 4)
    assert cache.residual("encoder").shape == (2, 7, 3) and cache.neurons(1, "decoder").shape == (2, 4, 24)
    assert {"encoder_blocks.0.hook_in", "decoder_blocks.1.cross_attn.o.hook_in"} <= set(cache.to_frame()["name"])
    for call in (cache.tokens, cache.heads, cache.residual):
        with pytest.raises(RelevanceError, match="stacks encoder, decoder, cross"):
            call()
    with pytest.raises(RelevanceError, match="no stack 'middle'.*encoder"):
        cache.heads("middle")


def test_a_cache_of_two_stacks_is_saved_and_read(tmp_path: object) -> None:
    model, (inputs, _) = build_encoder_decoder("t5"), sources_and_targets()
    cache = propagate(model, inputs, TARGET)
    cache.save(f"{tmp_path}/cache.safetensors")
    again = RelevanceCache.load(f"{tmp_path}/cache.safetensors")
    assert torch.equal(again.heads("cross"), cache.heads("cross")) and again.arguments.keys() == inputs.keys()


def test_ids_alone_are_the_source_and_the_decoder_begins() -> None:
    model, (inputs, _) = build_encoder_decoder("t5"), sources_and_targets()
    cache = propagate(model, inputs["input_ids"], TARGET)
    begun = propagate(model, {**inputs, "decoder_input_ids": torch.zeros(2, 1, dtype=torch.long)}, TARGET)
    close(cache.tokens("encoder"), begun.tokens("encoder"), 1e-12)
    assert cache.input_tokens.tolist() == [[0], [0]]


def test_a_continuation_extends_the_decoder() -> None:
    model, (inputs, other) = build_encoder_decoder("t5"), sources_and_targets()
    answer = torch.tensor([8, 9, 10])
    cache = propagate(model, inputs, continuation(answer), rules="deeplift", reference=other)
    full = torch.cat([inputs["decoder_input_ids"], answer[:2].expand(2, 2)], 1)
    with torch.no_grad():
        logits = model(inputs["input_ids"], decoder_input=full).log_softmax(-1)
    close(cache.value, logits[:, 3:].gather(2, answer.expand(2, 3).unsqueeze(-1)).sum((1, 2)), 1e-9)
    assert cache.tokens("decoder").shape == (2, 6)


def test_a_latent_of_the_encoder_can_be_explained() -> None:
    model, (inputs, _) = build_encoder_decoder("t5"), sources_and_targets()
    cache = propagate(model, inputs, latent("encoder_blocks.1.hook_out", unit=3, position=2))
    assert cache.value.shape == (2,) and float(cache.tokens("encoder").abs().sum()) > 0
    assert "decoder_blocks.0.hook_in" not in cache


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "decoder_input_ids"),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long), "decoder_input_ids": torch.ones(1, 3, dtype=torch.long)}, "one row per example"),
        ({"words": torch.ones(2, 3, dtype=torch.long)}, "no argument 'words'.*input_ids"),
        ({"input_ids": torch.full((1, 3), VOCAB_SIZE), "decoder_input_ids": torch.ones(1, 1, dtype=torch.long)}, "token ids must lie"),
        (
            {
                "input_ids": torch.ones(1, 3, dtype=torch.long),
                "decoder_input_ids": torch.ones(1, 1, dtype=torch.long),
                "attention_mask": torch.ones(1, 4, dtype=torch.long),
            },
            "attention_mask has shape",
        ),
        ({}, "one row per example"),
    ],
)
def test_bad_arguments_are_refused(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        propagate(build_encoder_decoder("t5", torch.float32), given, TARGET)


def test_references_that_do_not_fit_are_refused() -> None:
    model, (inputs, other) = build_encoder_decoder("t5", torch.float32), sources_and_targets()
    with pytest.raises(RelevanceError, match="arguments"):
        propagate(model, inputs, TARGET, rules="deeplift", reference={**other, "input_ids": other["input_ids"][:, :5]})
    with pytest.raises(RelevanceError, match="one stack of tokens"):
        propagate(model, inputs, TARGET, rules="deeplift", reference=torch.zeros(16))


@pytest.mark.parametrize("rules", ["gradient", "attnlrp", "cp_lrp", "deeplift"])
def test_the_bias_that_bart_adds_to_its_logits_keeps_its_share(rules: str) -> None:
    model = build_family("bart")
    model.original_model.final_logits_bias.copy_(torch.linspace(-1, 1, 50, dtype=torch.float64).reshape(1, 50))
    inputs = {"input_ids": torch.tensor([[1, 5, 7, 9]]), "decoder_input_ids": torch.tensor([[2, 4, 6]])}
    other = {"input_ids": torch.tensor([[1, 5, 8, 9]]), "decoder_input_ids": torch.tensor([[2, 4, 6]])}
    cache = propagate(model, inputs, logit(40), rules=rules, reference=other if rules == "deeplift" else None, audit=True)
    account = cache.conservation()
    bias = float(model.original_model.final_logits_bias[0, 40])
    assert account["unexplained"].abs().max() < 1e-9
    assert account.loc[account["layer"] == "output", "biases"].item() == pytest.approx(0.0 if rules == "deeplift" else bias, abs=1e-12)
