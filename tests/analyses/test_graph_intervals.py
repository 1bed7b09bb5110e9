"""Intervals of the nodes of flow graphs: around what `combined` estimates, held against patching, gone where they would be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import parse_node
from analyses.graph import FlowGraph, average, flow_graph, flow_graphs
from analyses.methods import estimator
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs, ioi
from lens_relevance import logit_diff, mean_embedding, random_tokens
from tests import models

TARGET = logit_diff(3, 4)


@pytest.fixture
def pair() -> PromptPairs:
    return PromptPairs(models.random_tokens(1), models.random_tokens(1, seed=1), TARGET)


def graph_of(model: TransformerBridge, pair: PromptPairs, by_position: bool = True) -> FlowGraph:
    return flow_graph(model, pair.clean, pair.target, reference=pair.corrupt, by_position=by_position)


def middles(graph: FlowGraph) -> dict[tuple[str, int], float]:
    table = graph.intervals
    return dict(zip(zip(table["node"], table["position"], strict=True), (table["low"] + table["high"]) / 2, strict=True))


def test_intervals_lie_around_what_combined_estimates(gpt2: TransformerBridge, pair: PromptPairs) -> None:
    scores = estimator("combined")(gpt2, pair, ["heads", "mlp", "resid"])
    apart, together = (middles(graph_of(gpt2, pair, by_position)) for by_position in (True, False))
    assert together["L1H2", -1] == pytest.approx(float(scores["heads"][0, 1, 2]), rel=1e-4) != 0
    assert sum(apart["L1H2", i] for i in range(6)) == pytest.approx(float(scores["heads"][0, 1, 2]), rel=1e-4)
    for i in range(6):
        assert apart["L1.mlp", i] == pytest.approx(float(scores["mlp"][0, 1, i]), rel=1e-4, abs=1e-7)
        assert apart["embed", i] == pytest.approx(float(scores["resid"][0, 0, i]), rel=1e-4, abs=1e-7)
    assert (graph_of(gpt2, pair).intervals["low"] <= graph_of(gpt2, pair).intervals["high"]).all()


def test_intervals_hold_the_patched_effects(embedded: TransformerBridge) -> None:
    pairs, held = ioi(embedded, n=3), []
    for i in range(3):
        pair = pairs[i : i + 1]
        table = graph_of(embedded, pair).intervals
        names = table["node"].str.replace("embed", "L0.resid")
        nodes = [parse_node(f"{name}@{position}") for name, position in zip(names, table["position"], strict=True)]
        effect = np.nan_to_num(activation_patching(embedded, pair, nodes, direction="mean", progress=False).effect[:, 0].numpy())
        slack = 1e-5 * np.abs(effect).max()
        held.append(table.assign(held=(effect >= table["low"] - slack) & (effect <= table["high"] + slack)))
    everything = pd.concat(held)
    kind = everything["node"].str.replace(r"^L\d+(H\d+|\.)", "", regex=True)
    assert (everything.groupby(kind)["held"].mean() >= 0.9).all() and len(everything) > 500
    assert 0 < (~everything["reliable"].astype(bool)).mean() < 0.1


def test_none_without_a_second_prompt(gpt2: TransformerBridge) -> None:
    tokens = models.random_tokens(1)
    for reference in (None, random_tokens(2)):
        assert flow_graph(gpt2, tokens, TARGET, reference=reference).intervals.empty
    assert flow_graph(gpt2, tokens, TARGET, reference=torch.randn(16) + 1).intervals.empty


def test_none_of_sums_differences_and_means(gpt2: TransformerBridge, pair: PromptPairs) -> None:
    graph = graph_of(gpt2, pair)
    assert len(graph.intervals)
    joined = (graph.sum_positions(), graph.diff(graph.above(0.01)), graph.group({"all": ["L0H0", "L0H1"]}), average([graph, graph]))
    assert all(one.intervals.empty for one in joined)
    assert all(one.intervals.empty for one in flow_graphs(gpt2, pair.clean, TARGET, reference=pair.corrupt))


def test_intervals_go_with_the_graph(gpt2: TransformerBridge, pair: PromptPairs, tmp_path: Path) -> None:
    graph = graph_of(gpt2, pair)
    pruned = graph.prune(top=30)
    assert 0 < len(pruned.intervals) < len(graph.intervals)
    assert set(pruned.intervals["node"]) <= set(pruned.nodes["node"])
    pd.testing.assert_frame_equal(FlowGraph.from_json(pruned.to_json()).intervals, pruned.intervals, check_dtype=False)
    first = pruned.intervals.iloc[0]
    pruned.to_graphml(tmp_path / "graph.graphml")
    node = nx.read_graphml(tmp_path / "graph.graphml").nodes[f"{first['node']}@{first['position']}"]
    assert node["low"] == pytest.approx(first["low"]) and node["high"] == pytest.approx(first["high"])
    old = {key: value for key, value in json.loads(pruned.to_json()).items() if key != "intervals"}
    assert FlowGraph.from_json(json.dumps(old)).intervals.empty


def test_the_view_has_them(gpt2: TransformerBridge, pair: PromptPairs) -> None:
    graph = graph_of(gpt2, pair).prune(top=30)
    drawn = {(mark.name, mark.position): mark.interval for mark in graph.show().flow.marks}
    for row in graph.intervals.itertuples():
        assert drawn[row.node, row.position] == (row.low, row.high, row.reliable)
    assert drawn["logits", 5] is None
    assert any(mark.interval for mark in graph_of(gpt2, pair, by_position=False).show().flow.marks)


def test_a_baseline_is_no_prompt_to_patch_from(embedded: TransformerBridge) -> None:
    assert flow_graph(embedded, "When Mary and John went", logit_diff(" Mary", " John"), reference=mean_embedding()).intervals.empty
