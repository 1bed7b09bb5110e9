"""What a user would write is taken, or refused with what to write instead."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from analyses import load_model
from analyses.tasks import ioi
from analyses.tasks.pairs import require_pairs
from analyses.views import head_heatmap_view, token_view
from analyses.views.markup import as_array
from lens_relevance import RelevanceError, logit_diff, propagate

PROMPT = "When Mary and John went to the store, John gave a drink to"
TARGET = logit_diff(" Mary", " John")


@pytest.fixture(scope="module")
def model():
    return load_model("embedded")


def test_heads_and_neurons_by_name_in_through(model) -> None:
    def tokens(through) -> torch.Tensor:
        return propagate(model, PROMPT, TARGET, rules="attnlrp", through=through).tokens()

    head = tokens({"blocks.1.attn.hook_z": {"head": [3]}})
    assert head.abs().max() > 0.1 and torch.equal(tokens("L1H3"), head)
    assert torch.equal(tokens(["L1H0", "L1H3"]), tokens({"blocks.1.attn.hook_z": {"head": [0, 3]}}))
    neurons = tokens({"blocks.0.mlp.hook_post": {"unit": [5, 7]}})
    assert neurons.abs().max() > 0 and torch.equal(tokens(["L0N5", "L0N7"]), neurons)
    both = {"blocks.1.attn.hook_z": {"head": [3]}, "blocks.0.mlp.hook_post": {"unit": [5]}}
    assert torch.equal(tokens(["L1H3", "L0N5"]), tokens(both))
    for wrong in ("L1", "1.3", ["L1H3", "four"], "L1H3.q"):
        with pytest.raises(RelevanceError, match="neither a head"):
            tokens(wrong)
    with pytest.raises(RelevanceError, match="out of range"):
        tokens("L1H9")
    with pytest.raises(RelevanceError, match="unknown HookPoint"):
        tokens("L9H0")


def test_prompts_where_pairs_are_needed(model) -> None:
    pairs = ioi(model, n=2)
    assert require_pairs(pairs) is pairs
    with pytest.raises(RelevanceError, match=r"not str: PromptPairs.from_strings\(model, clean="):
        require_pairs(PROMPT)


def test_pictures_of_a_batch_of_one_and_of_a_whole_cache(model) -> None:
    cache = propagate(model, PROMPT, TARGET, rules="attnlrp")
    tokens = model.to_str_tokens(PROMPT)
    assert token_view(tokens, cache.tokens()).to_html() == token_view(tokens, cache.tokens()[0]).to_html()
    with pytest.raises(RelevanceError, match="relevance has 2 positions"):
        token_view(tokens, torch.ones(2, 15))
    with pytest.raises(RelevanceError, match=r"scores is a RelevanceCache.*cache.tokens\(\)\[0\] \[pos\] or cache.heads\(\)"):
        as_array(cache, "scores")
    head_heatmap_view(cache.heads()[0].sum(0))


def test_a_module_without_hook_points(model) -> None:
    with pytest.raises(RelevanceError, match="Linear has no HookPoints: give a TransformerBridge"):
        propagate(nn.Linear(3, 3), torch.zeros(1, 3))
