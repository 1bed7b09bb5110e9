"""Rules never change the forward, and padding never changes relevance."""

from __future__ import annotations

import pytest
import torch

from lens_relevance import attach, logit, logit_diff, propagate
from tests.engine.families import FAMILIES, PAIRS, RULESETS, TARGET, build, close, inputs_and_reference, reference_for
from tests.models import build_gpt2, random_tokens

TOKENS, OTHER = inputs_and_reference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_same_bit_by_bit(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    with torch.no_grad():
        plain = model(TOKENS)
    for rules in RULESETS:
        reference = reference_for(rules, OTHER)
        if rules in ("attnlrp", "gim", "deeplift"):
            cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, names_filter="unembed.hook_out")
            assert torch.equal(cache.logits, plain), rules
        with attach(model, rules, reference=reference):
            inside = model(TOKENS)
        assert inside.requires_grad and torch.equal(inside, plain), rules
    assert torch.equal(model(TOKENS), plain)


@pytest.mark.parametrize("family", ["gpt2", "llama", "native_layer_norm", "native_rms_norm"])
def test_logits_stay_the_same_when_everything_is_watched(family: str) -> None:
    """Taps at every HookPoint put norms into their two-step form."""
    model = build(family, torch.float32)
    with torch.no_grad():
        plain = model(TOKENS)
    for rules in ("attnlrp", "deeplift"):
        cache = propagate(
            model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), names_filter=lambda name: True, audit=True
        )
        assert torch.equal(cache.logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_unpadded_runs(family: str) -> None:
    """Padded on the left and on the right."""
    model = build(family, torch.float32)
    lengths, width = (4, 7), 7
    rows, others = ([random_tokens(1, n, seed=s + n)[0] for n in lengths] for s in (0, 100))

    def padded(parts: list[torch.Tensor], side: str) -> torch.Tensor:
        filled = [torch.full((width - len(p),), 1) for p in parts]
        return torch.stack([torch.cat([f, p] if side == "left" else [p, f]) for f, p in zip(filled, parts, strict=True)])

    for rules in ("attnlrp", "gim", "deeplift"):
        references = others if rules in PAIRS else None
        each_alone = [
            propagate(model, row[None], TARGET, rules=rules, reference=None if references is None else other[None])
            for row, other in zip(rows, others, strict=True)
        ]
        for side in ("left", "right"):
            mask = padded([torch.ones(n, dtype=torch.long) * 2 for n in lengths], side) - 1
            reference = None if references is None else padded(references, side)
            together = propagate(model, padded(rows, side), TARGET, rules=rules, reference=reference, attention_mask=mask)
            for i, (n, alone) in enumerate(zip(lengths, each_alone, strict=True)):
                real = slice(width - n, width) if side == "left" else slice(0, n)
                hidden = mask[i] == 0
                assert together.value[i].item() == pytest.approx(alone.value[0].item(), rel=1e-5, abs=1e-5)
                for name in alone:
                    if alone[name].abs().max() > 0:
                        close(together[name][i, real], alone[name][0], 1e-5)
                    assert not together[name][i, hidden].any(), name
                    assert not together.coefficients[name][i, hidden].any(), name


@pytest.mark.parametrize("family", ["gpt2", "llama", "native_layer_norm", "gemma2"])
def test_patterns_scores_and_values_at_padding(family: str) -> None:
    """Queries and keys at padding: exactly 0 and finite, also where a row sees nothing but padding."""
    model, tokens = build(family, torch.float32), random_tokens(2, 6)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    for rules in ("attnlrp", "deeplift"):
        reference = reference_for(rules, random_tokens(2, 6, seed=4))
        cache = propagate(
            model, tokens, TARGET, rules=rules, reference=reference, attention_mask=mask, names_filter=lambda name: ".attn." in name
        )
        for name in cache:
            assert bool(torch.isfinite(cache[name]).all()), name
            if name.endswith(("hook_pattern", "hook_attn_scores")):
                assert not cache[name][0, :, :3].any() and not cache[name][0, :, :, :3].any(), name
            elif name.endswith(("q.hook_out", "k.hook_out", "v.hook_out", "o.hook_in")):
                assert not cache[name][0, :3].any() and cache[name][0, 3:].any(), name


def test_a_target_that_reads_padding_gives_it_no_relevance() -> None:
    """The queries of padded positions see real keys, so that only the mask keeps their coefficients at zero."""
    model, tokens = build("gpt2", torch.float32), random_tokens(2, 6)
    mask = torch.ones_like(tokens)
    mask[0, 4:] = 0
    names = ["embed.hook_out", "blocks.1.hook_in", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]

    def everywhere(logits: torch.Tensor) -> torch.Tensor:
        return logits[..., 3].sum(1)

    cache = propagate(model, tokens, everywhere, rules="gradient", names_filter=names, attention_mask=mask)
    for name in names[:2]:
        assert not cache.coefficients[name][0, 4:].any() and cache.coefficients[name][0, :4].all()
    for name in names[2:]:
        assert not cache.coefficients[name][0, :, 4:].any() and cache.coefficients[name][1, :, 4:, :4].any()


def test_positions_count_real_tokens() -> None:
    """-1 is each row's last real token, whichever side is padded."""
    model, tokens = build_gpt2(), random_tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    cache = propagate(model, tokens, logit(5), attention_mask=mask)
    logits = model(tokens, attention_mask=mask)
    assert cache.logit_positions is not None and cache.logit_positions.tolist() == [[3], [5]]
    assert cache.value.tolist() == pytest.approx([logits[0, 3, 5].item(), logits[1, 5, 5].item()])
    cache = propagate(model, tokens, logit(5, position=1), attention_mask=mask.flip(1))
    logits = model(tokens, attention_mask=mask.flip(1))
    assert cache.logit_positions is not None and cache.logit_positions.tolist() == [[3], [1]]
    assert cache.value.tolist() == pytest.approx([logits[0, 3, 5].item(), logits[1, 1, 5].item()])


def test_batches_equal_single_prompts() -> None:
    model, tokens = build_gpt2(dtype=torch.float64), random_tokens(3, 6)
    together = propagate(model, tokens, logit_diff([5, 6, 7], [8, 9, 10]), rules="attnlrp")
    for i in range(3):
        alone = propagate(model, tokens[i : i + 1], logit_diff(5 + i, 8 + i), rules="attnlrp")
        for name in alone:
            close(together[name][i], alone[name][0], 1e-10)


@pytest.mark.parametrize("rules", RULESETS)
def test_bf16_sums_are_made_in_fp32(rules: str) -> None:
    model = build_gpt2(dtype=torch.bfloat16)
    cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=True)
    assert cache.value.dtype == torch.float32 and cache.tokens().dtype == torch.float32
    assert cache.activations["blocks.0.hook_in"].dtype == torch.bfloat16
    assert all(bool(torch.isfinite(cache[name]).all()) for name in cache)
    full = propagate(build_gpt2(), TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER))
    pair = torch.stack([cache.tokens().flatten(), full.tokens().flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.98
