"""LLaVA: relevance of image patches and of words at the language model's input, under every ruleset."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analyses.benchmarks.tiny_models import FAMILIES
from lens_relevance import RelevanceError, coverage, mean_embedding, propagate, random_tokens
from tests.engine.families import RULESETS, TARGET, close, reference_for, unexplained, whole
from tests.precision import no_upcasts

IMAGE, PATCHES = 49, 4


def _inputs(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, IMAGE, (2, 6), generator=generator)
    tokens = torch.cat([words[:, :1], torch.full((2, PATCHES), IMAGE), words[:, 1:]], 1)
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator)}


ONE, OTHER = _inputs(0), _inputs(1)


def test_every_ruleset_conserves_and_leaves_the_forward_alone() -> None:
    model = FAMILIES["llava"].build()
    with torch.no_grad():
        logits = model(ONE["input_ids"], pixel_values=ONE["pixel_values"])
    with no_upcasts():
        for rules in RULESETS:
            reference = OTHER if reference_for(rules, ONE["input_ids"]) is not None else None
            cache = propagate(model, ONE, TARGET, rules=rules, reference=reference, audit=True)
            assert unexplained(cache) < 1e-9, rules
            if rules in ("cp_lrp", "deeplift"):  # Llama without biases: all of it is at the embeddings of patches and words
                close(cache.tokens().sum(1), whole(cache), 1e-9)
                close(cache.residual().sum(1), whole(cache).unsqueeze(1).expand(-1, 3), 1e-9)
    cache = propagate(model, ONE, TARGET, rules="attnlrp")
    assert torch.equal(propagate(model, ONE, TARGET, rules="attnlrp", names_filter="unembed.hook_out").logits, logits)
    patches = cache.tokens()[ONE["input_ids"] == IMAGE].unflatten(0, (2, PATCHES))
    assert float(patches.abs().min()) > 0
    found = coverage(model).rulesets
    assert found["works"].equals(found["applies"])


def test_another_image_is_another_reference() -> None:
    """The same words and another image: the words' own embeddings do not differ, so all relevance is at the patches."""
    model = FAMILIES["llava"].build()
    with no_upcasts():
        cache = propagate(model, ONE, TARGET, rules="deeplift", reference=ONE | {"pixel_values": OTHER["pixel_values"]})
    seen = ONE["input_ids"] == IMAGE
    assert float(cache.tokens()[~seen].abs().max()) == 0
    close((cache.tokens() * seen).sum(1), whole(cache), 1e-9)


@pytest.mark.parametrize("baseline", [random_tokens(2), mean_embedding()], ids=["random_tokens", "mean_embedding"])
def test_a_baseline_of_words_leaves_the_image_where_it_is(baseline: object) -> None:
    model = FAMILIES["llava"].build()
    with no_upcasts():
        cache = propagate(model, ONE, TARGET, rules="deeplift", reference=baseline)
    assert float(cache.tokens()[ONE["input_ids"] == IMAGE].abs().max()) == 0
    close(cache.tokens().sum(1), whole(cache), 1e-9)


def test_an_image_that_does_not_reach_the_tokens_is_an_error() -> None:
    model = FAMILIES["llava"].build(torch.float32)
    with pytest.raises((RelevanceError, ValueError), match="[Ii]mage"):
        propagate(model, {"input_ids": ONE["input_ids"][:, :3], "pixel_values": ONE["pixel_values"].float()}, TARGET, rules="attnlrp")


def test_an_image_among_words_has_no_mean_to_be_compared_with() -> None:
    model = FAMILIES["llava"].build()
    found, expected = propagate(model, ONE, TARGET), propagate(model, ONE, TARGET, rules="attnlrp")
    assert found.info["ruleset"] == "attnlrp" and torch.equal(found.tokens(), expected.tokens()) and bool(found.tokens().any())
    with pytest.raises(RelevanceError, match="'deeplift' compares two runs: pass reference="):
        propagate(model, ONE, TARGET, rules="deeplift")
    assert propagate(model, {"input_ids": ONE["input_ids"][:, :1]}, TARGET).info["ruleset"] == "deeplift"
