"""What a user would write is taken, or refused with what to write instead."""

from __future__ import annotations

from functools import partial
from html import unescape
from inspect import unwrap

import pandas as pd
import pytest
import torch
from torch import nn

from analyses import (
    ablation,
    activation_patching,
    faithfulness_table,
    load_model,
    rank_heads,
    rank_neurons,
    rank_positions,
)
from analyses.evaluation.comparison import compare
from analyses.graph import flow_graph
from analyses.patching import path_patching
from analyses.tasks import PromptPairs, ioi
from analyses.tasks.pairs import require_pairs
from analyses.views import head_heatmap_view, token_view
from analyses.views.markup import as_array
from lens_relevance import NotKeptError, RelevanceCache, RelevanceError, logit_diff, propagate, token_relevance

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
    with pytest.raises(RelevanceError, match=r"not str: PromptPairs.of\(model, prompt, against, target="):
        require_pairs(PROMPT)
    by_path = partial(unwrap(path_patching), senders="heads", receivers="v")
    others = (activation_patching, ablation, faithfulness_table, compare, rank_positions)
    for analysis in (by_path, *map(unwrap, others)):  # without the tests' own checks of types
        with pytest.raises(RelevanceError, match="pairs of prompts are needed, not str"):
            analysis(model, PROMPT)


def test_one_pair_in_parts(model) -> None:
    against = PROMPT.replace(", John", ", Mary")
    pairs = PromptPairs.from_strings(model, clean=[PROMPT], corrupt=[against], answer=[" Mary"], wrong=[" John"])
    for rank in (rank_heads, rank_neurons):
        found = rank(model, PROMPT, TARGET, against=against)
        pd.testing.assert_frame_equal(found, rank(model, pairs))
        assert found["score"].abs().max() > 1
    ids = [model.to_tokens(text) for text in (PROMPT, against)]
    pd.testing.assert_frame_equal(rank_heads(model, ids[0], TARGET, against=ids[1]), rank_heads(model, pairs))
    usage = r"rank_heads\(model, prompt, target, against=other\)"
    for wrong in (lambda: rank_heads(model, PROMPT, TARGET), lambda: rank_heads(model, pairs, TARGET, against=against)):
        with pytest.raises(RelevanceError, match=usage):
            wrong()
    with pytest.raises(RelevanceError, match=usage):
        rank_heads(model, PROMPT, "deeplift", against=against)
    with pytest.raises(RelevanceError, match="have 15 and 4 tokens; a position must mean the same in both"):
        rank_heads(model, PROMPT, TARGET, against="When Mary and")


def test_pictures_of_a_batch_of_one_and_of_a_whole_cache(model) -> None:
    cache = propagate(model, PROMPT, TARGET, rules="attnlrp")
    tokens = model.to_str_tokens(PROMPT)
    assert token_view(tokens, cache.tokens()).to_html() == token_view(tokens, cache.tokens()[0]).to_html()
    with pytest.raises(RelevanceError, match="relevance has 2 positions"):
        token_view(tokens, torch.ones(2, 15))
    with pytest.raises(RelevanceError, match=r"scores is a RelevanceCache.*cache.tokens\(\)\[0\] \[pos\] or cache.heads\(\)"):
        as_array(cache, "scores")
    assert head_heatmap_view(cache).to_html() == head_heatmap_view(cache.heads()[0].sum(0)).to_html()
    assert token_view(cache).to_html() == token_view(tokens, cache.tokens()).to_html()
    with pytest.raises(RelevanceError, match="beside the tokens"):
        token_view(tokens)
    two = propagate(model, [PROMPT, PROMPT], TARGET, rules="attnlrp")
    for view in (token_view, head_heatmap_view):
        with pytest.raises(RelevanceError, match="holds 2 examples"):
            view(two)


def test_what_a_notebook_shows_of_a_result(model, tmp_path) -> None:
    short = "Mary and <b>John</b>"
    cache = propagate(model, [PROMPT, short], TARGET, rules="attnlrp", audit=True)
    assert cache.token_strings() == model.to_str_tokens(PROMPT)
    html = cache._repr_html_()
    heads = cache.heads().sum(1).mean(0)
    first = int(heads.abs().argmax())
    assert f"<td>L{first // heads.shape[1]}H{first % heads.shape[1]}</td><td>{heads.flatten()[first]:+.4g}</td>" in html
    assert f"{cache.tokens()[0, 3]:+.4g}" in html and "unexplained" in html
    assert html.count("<span") == int(cache.mask.sum()), "padding is not shown"
    assert "<b>" not in html, "text is shown as text"
    cache.save(tmp_path / "cache.safetensors")
    loaded = RelevanceCache.load(tmp_path / "cache.safetensors")
    assert "<span" not in loaded._repr_html_() and "<td>L" in loaded._repr_html_()
    with pytest.raises(NotKeptError, match="no tokenizer"):
        loaded.token_strings()
    assert "<span" not in propagate(model, PROMPT, TARGET, rules="attnlrp", names_filter="unembed.hook_in")._repr_html_()
    found = token_relevance(model, PROMPT, TARGET)
    assert len(repr(found)) < 200 and found._repr_html_().count("<span") == 15
    graph = flow_graph(model, PROMPT, TARGET, reference=PROMPT.replace("John gave", "Mary gave"))
    assert graph.paths(1)["path"][0] in unescape(graph._repr_html_())


def test_an_activation_cache_made_without_the_model(model) -> None:
    cache = propagate(model, PROMPT, TARGET, rules="attnlrp", names_filter=lambda name: True)
    bare = cache.to_activation_cache()
    assert torch.equal(bare["z", 1], cache["z", 1])
    with pytest.raises(RelevanceError, match=r"to_activation_cache\(model\)"):
        bare.stack_head_results(layer=1)


def test_a_module_without_hook_points(model) -> None:
    with pytest.raises(RelevanceError, match="Linear has no HookPoints: give a TransformerBridge"):
        propagate(nn.Linear(3, 3), torch.zeros(1, 3))
