"""Units set to other values: equal to weights changed by hand, on every kind of unit; the model left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.interventions import From, Scale, intervene, set_units
from lens_relevance import RelevanceError, logit_diff, propagate
from tests import models
from tests.engine.test_guest import same, state

PROMPT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
TARGET = logit_diff(" Mary", " John")


def head_columns(model: TransformerBridge, layer: int, head: int) -> tuple[torch.Tensor, slice]:
    """GPT-2's output weights of attention, whose rows are the heads' features, and the rows of one head."""
    width = model.cfg.d_model // model.cfg.n_heads
    return model.original_model.transformer.h[layer].attn.c_proj.weight, slice(head * width, (head + 1) * width)


@pytest.mark.parametrize("factor", [0.0, 2.5, -1.0])
def test_a_scaled_head_is_one_with_scaled_output_weights(embedded: TransformerBridge, factor: float) -> None:
    weight, rows = head_columns(embedded, 1, 3)
    with torch.no_grad():
        plain = embedded(PROMPT)
        with set_units(embedded, {"L1H3": Scale(factor)}):
            found = embedded(PROMPT)
        kept = weight[rows].clone()
        weight[rows] *= factor
        expected = embedded(PROMPT)
        weight[rows] = kept
        assert torch.equal(embedded(PROMPT), plain)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1


def test_a_neuron_at_a_value_is_a_constant_added_to_the_bias(embedded: TransformerBridge) -> None:
    mlp = embedded.original_model.transformer.h[0].mlp.c_proj
    with torch.no_grad():
        with set_units(embedded, {"L0N7": 3.0}):
            found = embedded(PROMPT)
        row, bias = mlp.weight[7].clone(), mlp.bias.clone()
        mlp.weight[7], mlp.bias[:] = 0.0, bias + 3.0 * row
        expected = embedded(PROMPT)
        mlp.weight[7], mlp.bias[:] = row, bias
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_everything_from_another_prompt_at_the_last_layer_gives_its_logits(embedded: TransformerBridge) -> None:
    with torch.no_grad():
        with set_units(embedded, {"L3.resid_post": From(OTHER)}):
            found = embedded(PROMPT)
        assert torch.equal(found, embedded(OTHER)) and not torch.equal(found, embedded(PROMPT))


@pytest.mark.parametrize("unit", ["L1H3", "L1H3.q", "L1H3.v", "L2.attn", "L2.mlp", "L2.resid", "L2N5"])
def test_one_position_from_another_prompt(embedded: TransformerBridge, unit: str) -> None:
    """At all positions one by one it is the whole; at one it changes nothing before."""
    with torch.no_grad():
        with set_units(embedded, {unit: From(OTHER)}):
            whole = embedded(PROMPT)
        with set_units(embedded, {f"{unit}@{i}": From(OTHER) for i in range(15)}):
            assert torch.equal(embedded(PROMPT), whole)
        with set_units(embedded, {f"{unit}@10": From(OTHER)}):
            one = embedded(PROMPT)
    plain = embedded(PROMPT)
    assert torch.equal(one[:, :10], plain[:, :10]) and not torch.equal(one[:, 10:], plain[:, 10:])


def test_a_mean_is_over_all_real_tokens(embedded: TransformerBridge) -> None:
    texts = ["Mary went", PROMPT]
    values = torch.cat([embedded.run_with_cache(text)[1]["z", 1][0, :, 3] for text in texts]).mean(0)
    seen = []
    with set_units(embedded, {"L1H3": "mean"}, prompts=texts), embedded.hooks([("blocks.1.attn.hook_z", lambda x, hook: seen.append(x))]):
        embedded(PROMPT)
    torch.testing.assert_close(seen[0][0, :, 3], values.expand(15, -1), atol=1e-5, rtol=1e-4)
    plain = embedded.run_with_cache(PROMPT)[1]["z", 1]
    assert torch.equal(seen[0][:, :, :3], plain[:, :, :3]), "other heads stay"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "neox", "qwen3", "olmo2", "native"])
def test_units_of_other_families_and_relevance_under_an_intervention(family: str) -> None:
    """A head without output has no relevance, and what is explained is the changed model's value."""
    model = getattr(models, f"build_{family}")(dtype=torch.float64)
    tokens = models.random_tokens(1)
    with torch.no_grad(), set_units(model, {"L0H1": 0.0, "L1N3": 0.0}):
        value = model(tokens)[0, -1, 3]
        _, cache = model.run_with_cache(tokens)
    assert value != model(tokens)[0, -1, 3]
    assert cache["blocks.0.attn.hook_z"][:, :, 1].abs().max() == 0 == cache["blocks.1.mlp.hook_post"][..., 3].abs().max()
    with set_units(model, {"L0H1": 0.0, "L1N3": 0.0}):
        relevance = propagate(model, tokens, lambda logits: logits[:, -1, 3], rules="attnlrp")
    assert relevance.value.item() == pytest.approx(value.item(), rel=1e-6)
    assert relevance.heads()[:, :, 0, 1].abs().max() == 0 and relevance.neurons(1)[..., 3].abs().max() == 0
    assert relevance.heads()[:, :, 0, 0].abs().max() > 0


def test_intervene_tells_the_change_of_target_and_text(embedded: TransformerBridge) -> None:
    settings: dict[str, Any] = {f"L{layer}.attn": 0.0 for layer in range(4)}
    found = intervene(embedded, [PROMPT, OTHER], settings, target=TARGET, new_tokens=2)
    logits = embedded(PROMPT)[0, -1]
    mary, john = (embedded.to_single_token(name) for name in (" Mary", " John"))
    assert found.before[0].item() == pytest.approx((logits[mary] - logits[john]).item(), rel=1e-5)
    with set_units(embedded, settings):
        changed = embedded(PROMPT)[0, -1]
    assert found.after[0].item() == pytest.approx((changed[mary] - changed[john]).item(), rel=1e-5)
    assert found.change[0] < -2 and torch.equal(found.change, found.after - found.before)
    assert found.text_before[0].startswith((" Mary", "Mary")) and len(found.text_after) == 2
    assert found.text_after[0] != found.text_before[0] and "->" in repr(found)
    own = intervene(embedded, PROMPT, settings)
    assert own.before.item() > 0 and own.text_before == ()


def test_text_under_a_setting_at_one_position_is_that_of_the_whole_forward(embedded: TransformerBridge) -> None:
    found = intervene(embedded, PROMPT, {"L1H3@14": 0.0}, new_tokens=3).text_after[0]
    tokens = embedded.to_tokens(PROMPT)
    for _ in range(3):
        with set_units(embedded, {"L1H3@14": 0.0}):
            tokens = torch.cat([tokens, embedded(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    assert found == embedded.tokenizer.decode(tokens[0, 15:].tolist())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no unit to set"),
        ({"L1H9": 0.0}, "L1H9 is out of range: the layer has 4 heads"),
        ({"L9H0": 0.0}, "L9H0 is out of range: the model has 4 layers"),
        ({"L1N99999": 0.0}, "L1N99999 is out of range"),
        ({"L1H3@40": 0.0}, "this forward has 15 positions"),
        ({"embed": 0.0}, "embed cannot be set"),
        ({"L1H3.pattern": 0.0}, "cannot be set"),
        ({"the best head": 0.0}, "names no node"),
        ({"L1H3": "zero"}, "not 'zero'"),
        ({"L1H3": "mean"}, "a mean over prompts"),
        ({"L1H3": 0.0, "L1H3@2": Scale(2)}, "L1H3@2 is set twice"),
        ({"L1H3": From("Mary went")}, "has 3 positions, this forward 15"),
    ],
)
def test_bad_settings_are_named_and_the_model_stays_as_it_was(embedded: TransformerBridge, settings: Any, said: str) -> None:
    embedded(PROMPT)
    before = state(embedded)
    with pytest.raises(RelevanceError, match=said), set_units(embedded, settings):
        embedded(PROMPT)
    same(before, state(embedded))


def test_no_text_after_a_swap(embedded: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="generated tokens have none"):
        intervene(embedded, PROMPT, {"L1H3": From(OTHER)}, new_tokens=2)
