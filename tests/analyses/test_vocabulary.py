"""One vocabulary: components by any of their names mean the same everywhere, and nodes are written and read in one form."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import Ablation, known_circuit, score_items
from analyses.components import COMPONENTS, SCORED, Node, find_node, owner, parse_node, resolve_component, resolve_run
from analyses.evaluation.comparison import compare
from analyses.evaluation.ranking import rank_heads
from analyses.methods import estimator
from analyses.patching import activation_patching
from lens_relevance import RelevanceError
from lens_relevance.errors import OutOfRangeError
from tests.analyses.test_ranking import random_pairs

NAMES = {"resid": "resid_pre", "attn": "attn_out", "mlp": "mlp_out", "heads": "z", "neurons": "neuron"}
"""Components that have two names."""


def all_nodes() -> list[Node]:
    """One node of every kind, at a position and without one."""
    nodes = [Node(name) for name in ("embed", "pos_embed", "bias", "logits")] + [Node("mlp.in", 4)]
    for name, component in COMPONENTS.items():
        nodes.append(Node(name, 12, **({} if component.index == "position" else {component.index: 345})))
    return [Node(node.component, node.layer, at, node.head, node.neuron) for node, at in product(nodes, (None, 0, 17))]


def test_a_node_is_read_as_it_is_written() -> None:
    texts = [str(node) for node in all_nodes()]
    assert len(set(texts)) == len(texts) == 48
    assert [parse_node(text) for text in texts] == all_nodes()
    assert {"L12H345", "L12H345.q", "L12.mlp", "L12N345", "L12.resid@17", "L4.mlp.in", "embed@0", "L12H345.pattern@17"} <= set(texts)


@pytest.mark.parametrize("text", ["L3", "H5", "l3h5", "L3H5.z", "L3.q", "L3.heads", "L3.mlp.out", "L3H5@", "L3N", "embed.in", ""])
def test_what_names_no_node(text: str) -> None:
    assert find_node(text) is None
    with pytest.raises(RelevanceError, match="names no node"):
        parse_node(text)


def test_inputs_belong_to_their_component() -> None:
    names = ["L4H1.q", "L4H1.v", "L4.mlp.in", "L4H1", "L4.mlp", "embed", "name movers"]
    assert [owner(name) for name in names] == ["L4H1", "L4H1", "L4.mlp", "L4H1", "L4.mlp", "embed", "name movers"]


def test_two_names_are_one_component() -> None:
    for name, alias in NAMES.items():
        assert resolve_component(alias) is resolve_component(name) is COMPONENTS[name]
        assert Node(alias, 1, head=2) == Node(name, 1, head=2)
    with pytest.raises(RelevanceError, match="unknown component 'tails'; there are resid"):
        resolve_component("tails")
    assert resolve_run("both") == resolve_run("mean") == "mean"
    with pytest.raises(RelevanceError, match="run is 'corrupt', 'clean' or 'mean'"):
        resolve_run("backwards")


@pytest.mark.parametrize("name", [name for name in NAMES if name != "neurons"])
def test_two_names_give_one_result(gpt2: TransformerBridge, name: str) -> None:
    pairs, alias = random_pairs(), NAMES[name]
    patched, again = (activation_patching(gpt2, pairs, each) for each in (name, alias))
    assert torch.equal(patched.effect, again.effect) and patched.effect.abs().max() > 1e-3
    assert set(again.to_dataframe()["component"]) == {name} and again.grid(alias).equals(patched.grid(name))
    scores = estimator("relp")(gpt2, pairs, [alias])
    assert list(scores) == [name] and torch.equal(scores[name], estimator("relp")(gpt2, pairs, [name])[name])
    table = compare(gpt2, pairs, ["relp"], components=[alias, name], resamples=0)
    assert list(table.table["component"]) == [name]
    np.testing.assert_allclose(
        table.scores["patching"], activation_patching(gpt2, pairs, name, direction="mean").effect.mean(1), rtol=1e-4, atol=1e-5
    )


def test_heads_by_either_name_are_ranked_alike(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    assert rank_heads(gpt2, pairs, component="z").equals(rank_heads(gpt2, pairs))
    with pytest.raises(RelevanceError, match="rank_heads ranks heads, q, k or v, not 'mlp_out'"):
        rank_heads(gpt2, pairs, component="mlp_out")


def test_the_mean_of_both_runs_by_either_name(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    both, mean = (estimator("relp")(gpt2, pairs, ["heads"], run=run)["heads"] for run in ("both", "mean"))  # type: ignore[arg-type]
    assert torch.equal(both, mean) and (both - estimator("relp")(gpt2, pairs, ["heads"])["heads"]).abs().max() > 1e-3
    ablation = Ablation(gpt2, pairs, "node")
    assert np.array_equal(score_items(ablation, "relp", "both").signed, score_items(ablation, "relp", "mean").signed)


def test_nodes_in_text_are_patched(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    nodes = [Node("q", 1, head=2), Node("heads", 0, 3, head=1), Node("resid", 1, 2), Node("neurons", 0, neuron=5)]
    as_text = activation_patching(gpt2, pairs, [str(node) for node in nodes])
    assert as_text.nodes == tuple(nodes) and as_text.effect.abs().max() > 1e-3
    assert torch.equal(as_text.effect, activation_patching(gpt2, pairs, nodes).effect)
    with pytest.raises(OutOfRangeError, match="no head 9"):
        activation_patching(gpt2, pairs, "L0H9")
    with pytest.raises(RelevanceError, match="embed cannot be patched"):
        activation_patching(gpt2, pairs, "embed")


def test_circuits_speak_of_the_same_nodes(gpt2: TransformerBridge) -> None:
    items = Ablation(gpt2, random_pairs(), "node").items
    assert all(str(parse_node(name)) == name for name in items.frame["node"])
    known = known_circuit(items, [Node("z", 1, head=2), "L0.mlp"])
    assert list(known.to_frame()["node"]) == ["L0.mlp", "L1H2"]


def test_every_scored_component_is_one() -> None:
    assert set(SCORED) <= set(COMPONENTS)
