"""Flow graphs: conserved at every node, pruned to connected subgraphs, exact after a round trip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.describe import written_tokens
from analyses.graph import FlowGraph, average, flow_graph, flow_graphs
from lens_relevance import RelevanceError, logit_diff
from tests import models
from tests.precision import no_upcasts
from tests.wider_models import WIDER, build_wider

TARGET = logit_diff(3, 4)
READERS = ("q", "k", "v", "mlp.in")


def build(family: str = "gpt2", rules: str = "attnlrp", pair: bool = False, **arguments: Any) -> FlowGraph:
    model = build_wider(family) if family in WIDER else getattr(models, f"build_{family}")(dtype=torch.float64)
    other = models.random_tokens(1, seed=1) if pair else None
    with no_upcasts():
        return flow_graph(model, models.random_tokens(1), TARGET, rules=rules, reference=other, **arguments)


@pytest.fixture(scope="module")
def graph() -> FlowGraph:
    return build()


def balance(graph: FlowGraph) -> tuple[float, float]:
    """(inside, outside): worst node, relative to the sum of |edge|: what enters and stays, and what leaves, against its score."""
    total = graph.edges["score"].abs().sum()
    entering = graph.edges.groupby(["target", "position"])["score"].sum()
    leaving = graph.edges.groupby(["source", "source_position"])["score"].sum()
    stays = graph.sinks.groupby(["node", "position"])["score"].sum()
    inside, outside = 0.0, 0.0
    for row in graph.nodes.itertuples():
        key = (row.node, row.position)
        sink = stays.get(key, 0.0)
        if row.component in READERS:
            inside = max(inside, abs(row.score - entering.get(key, 0.0)))
            outside = max(outside, abs(row.score + sink - leaving.get(key, 0.0)))
        elif row.component in ("heads", "mlp", "logits"):
            inside = max(inside, abs(row.score - sink - entering.get(key, 0.0)))
        if row.component not in (*READERS, "logits"):
            outside = max(outside, abs(row.score - leaving.get(key, 0.0)))
    return inside / total, outside / total


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "gemma2", "olmo2", "qwen3", "native"])
def test_what_enters_a_node_is_what_leaves_it_and_its_sinks(family: str) -> None:
    for rules in ("gradient", "attnlrp", "cp_lrp", "gim"):
        assert max(balance(build(family, rules))) < 1e-9, rules


@pytest.mark.parametrize("family", ["bloom", "opt", "gptj", "bert", "mixtral"])
def test_more_families(family: str) -> None:
    for rules in ("gradient", "attnlrp"):
        graph = build(family, rules)
        assert max(balance(graph)) < 1e-9 and len(graph.paths(3)) == 3, rules
        assert graph.open("L1.mlp", 5).columns[1] == ("target" if family == "mixtral" else "position")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "native", "bert"])
def test_a_pair_loses_nothing_under_deeplift(family: str) -> None:
    graph = build(family, "deeplift", pair=True)
    assert max(balance(graph)) < 1e-9
    total = graph.edges["score"].abs().sum()
    assert graph.sinks["score"].abs().max() < 1e-9 * total, "deeplift has no sinks"
    assert graph.nodes.loc[graph.nodes["component"].isin(["embed", "pos_embed"]), "score"].sum() == pytest.approx(graph.value)
    assert graph.nodes.loc[graph.nodes["node"] == "logits", "score"].sum() == pytest.approx(graph.value)


def test_sinks_are_told_apart() -> None:
    kept = {rules: build("gpt2", rules).sinks.groupby("sink")["score"].apply(lambda s: s.abs().sum()) for rules in ("attnlrp", "cp_lrp")}
    assert kept["attnlrp"]["softmax"] > 1e-6 and kept["attnlrp"].get("activation", 0.0) < 1e-12
    assert kept["cp_lrp"].get("product", 0.0) < 1e-12 and kept["cp_lrp"]["bias"] > 1e-6


def test_tables_have_their_columns_and_names(graph: FlowGraph) -> None:
    assert {"source", "target", "position", "source_position", "score"} <= set(graph.edges)
    assert {"node", "position", "score"} <= set(graph.nodes)
    assert {"embed", "pos_embed", "bias", "L1H3", "L0.mlp", "L1H2.q", "L1H2.k", "L1H2.v", "L1.mlp.in", "logits"} <= set(graph.nodes["node"])
    across = graph.edges[graph.edges["position"] != graph.edges["source_position"]]
    assert len(across) and set(across["source"].str[-2:]) == {".k", ".v"} and (across["position"] > across["source_position"]).all()


@pytest.mark.parametrize("how", [dict(keep=0.6), dict(top=25), dict(min_share=0.02)])
def test_pruned_graphs_are_connected(graph: FlowGraph, how: dict[str, Any]) -> None:
    pruned = graph.prune(**how)
    assert 0 < len(pruned.edges) < len(graph.edges)
    flow = pruned.to_networkx()
    inputs = {n for n in flow if n.split("@")[0] in ("embed", "pos_embed", "bias")}
    targets = {n for n in flow if n.startswith("logits")}
    assert nx.is_directed_acyclic_graph(flow) and inputs and targets
    below = set().union(*(nx.descendants(flow, n) for n in inputs)) | inputs
    above = set().union(*(nx.ancestors(flow, n) for n in targets)) | targets
    assert set(flow) == below & above


def test_prune_keeps_what_it_promises(graph: FlowGraph) -> None:
    assert len(graph.prune(top=40).edges) <= 40
    kept = graph.prune(keep=0.7)
    whole = graph.edges.assign(size=graph.edges["score"].abs()).groupby(["target", "position"])["size"].sum()
    part = kept.edges.assign(size=kept.edges["score"].abs()).groupby(["target", "position"])["size"].sum()
    assert (part / whole.loc[part.index]).min() >= 0.7 - 1e-9
    entering = graph.edges.loc[graph.edges["target"] == "logits", "score"].abs().sum()
    assert graph.prune(min_share=0.03).edges["score"].abs().min() >= 0.03 * entering
    everything = graph.prune(keep=1.0)
    assert everything.paths(3).equals(graph.paths(3))


def test_paths_are_the_strongest_of_all() -> None:
    pruned = build().prune(top=60)
    flow = pruned.to_networkx()
    share = {}
    for node in flow:
        total = sum(abs(flow.edges[e]["score"]) for e in flow.in_edges(node))
        share |= {e: abs(flow.edges[e]["score"]) / total for e in flow.in_edges(node)}
    targets = [n for n in flow if n.startswith("logits")]
    assert len(targets) == 1
    every = {
        " -> ".join(path): float(np.prod([share[e] for e in nx.utils.pairwise(path)]))
        for n in flow
        if n.split("@")[0] in ("embed", "pos_embed", "bias")
        for path in nx.all_simple_paths(flow, n, targets[0])
    }
    assert sum(every.values()) == pytest.approx(1)
    found = pruned.paths(10)
    best = sorted(every.values(), reverse=True)[:10]
    assert found["share"].tolist() == pytest.approx(best)
    assert all(every[p] == pytest.approx(s) for p, s in zip(found["path"], found["share"], strict=True))


def test_bottlenecks_are_dominators() -> None:
    pruned = build().prune(top=30)
    found = pruned.bottlenecks(5)
    flow = pruned.to_networkx()
    target = next(n for n in flow if n.startswith("logits"))
    for row in found.itertuples():
        node = f"{row.node}@{row.position}"
        rest = flow.copy()
        rest.remove_node(node)
        lost = set(flow) - {node} - nx.ancestors(rest, target) - {target}
        assert len(lost) == row.dominates
    assert found["through"].between(0, 1 + 1e-12).all()


def test_round_trips(graph: FlowGraph, tmp_path: Path) -> None:
    assert FlowGraph.from_json(graph.to_json()) == graph
    graph.to_json(tmp_path / "graph.json")
    again = FlowGraph.from_json(tmp_path / "graph.json")
    assert again == graph and again.prune(top=20) == graph.prune(top=20)
    pruned = graph.prune(top=20)
    pruned.to_graphml(tmp_path / "graph.graphml")
    read = nx.read_graphml(tmp_path / "graph.graphml")
    assert set(read.edges) == set(pruned.to_networkx().edges) and len(read.edges) == len(pruned.edges)
    with pytest.raises(RelevanceError, match="not written by"):
        FlowGraph.from_json("{}")


def test_equality_and_difference(graph: FlowGraph) -> None:
    other = build(rules="relp")
    assert graph == build() and graph != other
    gap = graph.diff(other)
    assert gap.edges["score"].abs().max() > 1e-6 and not graph.diff(graph).edges["score"].any()
    row = gap.edges.iloc[0]
    assert row["score"] == row["first"] - row["second"]
    shuffled = FlowGraph(**{**vars(graph), "edges": graph.edges.sample(frac=1, random_state=0)})
    assert shuffled == graph


def test_sums_over_positions_and_prompts(graph: FlowGraph) -> None:
    summed = graph.sum_positions()
    assert (summed.edges["position"] == -1).all() and not summed.by_position and summed == build(by_position=False)
    edge = graph.edges[(graph.edges["source"] == "embed") & (graph.edges["target"] == "L1H0.v")]
    assert summed.edges.set_index(["source", "target"])["score"]["embed", "L1H0.v"] == pytest.approx(edge["score"].sum())
    model = models.build_gpt2(dtype=torch.float64)
    graphs = flow_graphs(model, models.random_tokens(3), TARGET, rules="attnlrp")
    mean = average([g.prune(top=30) for g in graphs])
    frequency = pd.concat([g.prune(top=30).sum_positions().edges[["source", "target"]] for g in graphs]).value_counts() / 3
    assert mean.edges.set_index(["source", "target"])["frequency"].sort_index().tolist() == frequency.sort_index().tolist()
    assert (mean.edges["frequency"] < 1).any()
    total = pd.concat([g.prune(top=30).sum_positions().edges for g in graphs]).groupby(["source", "target"])["score"].sum()
    pd.testing.assert_series_equal(mean.edges.groupby(["source", "target"])["score"].sum(), total / 3)  # 0 where an edge is not there
    both = average(graphs, by_position=True)
    key = ["source", "target", "position", "source_position"]
    assert both.edges.set_index(key)["score"]["embed", "logits", 5, 5] == pytest.approx(
        np.mean([g.edges.set_index(key)["score"]["embed", "logits", 5, 5] for g in graphs])
    )
    assert both.value == pytest.approx(np.mean([g.value for g in graphs]))


def test_groups_of_heads(graph: FlowGraph) -> None:
    grouped = graph.group({"early": ["L0H0", "L0H1"], "late": ["L1H0", "L1.mlp"]})
    names = set(grouped.edges["source"]) | set(grouped.edges["target"])
    assert {"early", "late"} <= names and not any(n.startswith(("L0H0", "L0H1", "L1H0", "L1.mlp")) for n in names)
    pair = (grouped.edges["source"] == "early") & (grouped.edges["target"] == "late")
    members = graph.edges["source"].isin(["L0H0", "L0H1"]) & graph.edges["target"].str.match(r"L1H0\.|L1\.mlp\.in")
    assert grouped.edges[pair]["score"].sum() == pytest.approx(graph.edges[members]["score"].sum())
    with pytest.raises(RelevanceError, match="no head or MLP"):
        graph.group({"x": ["L9H9"]})


def test_nodes_open(graph: FlowGraph) -> None:
    neurons = graph.open("L1.mlp", 5)
    assert len(neurons) == 10 and neurons["score"].abs().is_monotonic_decreasing
    head = graph.open("L1H2", 5)
    assert set(head["source"]) <= {"L1H2.q", "L1H2.k", "L1H2.v"} and set(head["source_position"]) == set(range(6))
    with pytest.raises(RelevanceError, match="no node"):
        graph.open("L7H7")


def test_show_draws_the_graph(graph: FlowGraph) -> None:
    page = graph.prune(top=30).show()._repr_html_()
    assert "L1H" in page and "<script" in page
    graph.sum_positions().prune(top=10).show()
    graph.group({"late": ["L1H0", "L1H1"]}).show()


def test_errors_name_the_thing(graph: FlowGraph) -> None:
    with pytest.raises(RelevanceError, match="removes every edge"):
        build(threshold=1e9)
    with pytest.raises(RelevanceError, match="one of keep"):
        graph.prune()
    with pytest.raises(RelevanceError, match="share"):
        graph.prune(keep=1.5)
    with pytest.raises(RelevanceError, match="leaves no path"):
        graph.prune(min_share=1.0)
    with pytest.raises(RelevanceError, match="no edges"):
        graph.with_edges(graph.edges[:0]).prune(top=5)
    with pytest.raises(RelevanceError, match="disconnected"):
        graph.with_edges(graph.edges[graph.edges["target"] != "logits"]).prune(top=5)
    with pytest.raises(RelevanceError, match="NaN"):
        graph.with_edges(graph.edges.assign(score=float("nan")))
    with pytest.raises(RelevanceError, match="one prompt"):
        flow_graph(models.build_gpt2(), models.random_tokens(2), TARGET)
    tokens = models.random_tokens(1)
    with pytest.raises(RelevanceError, match="the two runs are the same"):
        flow_graph(models.build_gpt2(), tokens, TARGET, rules="deeplift", reference=tokens)


def test_annotated_says_what_units_write_and_where_heads_look(embedded: TransformerBridge, tmp_path: Path) -> None:
    """Against the model's own tensors: the vector a unit adds, the final norm with its scale of this run, the unembedding."""
    prompt = "When Mary and John went to the store, John gave a drink to"
    graph = flow_graph(embedded, prompt, logit_diff(" Mary", " John"), rules="attnlrp").prune(top=60).annotated(embedded, prompt)
    logits, cache = embedded.run_with_cache(prompt)
    block, at = embedded.original_model.transformer.h, graph.labels
    norm, weight = embedded.original_model.transformer.ln_f, embedded.original_model.lm_head.weight

    def best(vector: torch.Tensor, position: int) -> str:
        scale = cache["blocks.3.hook_out"][0, position].var(correction=0).add(norm.eps).sqrt()
        ids = (weight @ ((vector - vector.mean()) / scale * norm.weight)).topk(3).indices
        return " ".join(repr(embedded.tokenizer.decode([int(i)])) for i in ids)

    checked = set()
    for row in graph.nodes[graph.nodes["component"].isin(["heads", "mlp"])].itertuples():
        if row.component == "heads":
            z = cache["z", row.layer][0, row.position, row.head]
            width = len(z)
            vector = z @ block[row.layer].attn.c_proj.weight[row.head * width : (row.head + 1) * width]
        else:
            vector = cache["mlp_out", row.layer][0, row.position]
        assert at[f"{row.node}@{row.position}"] == best(vector, row.position), row
        checked.add(row.component)
    for row in graph.neurons.itertuples():
        layer = int(row.node[1])
        vector = cache["post", layer][0, row.position, row.neuron] * block[layer].mlp.c_proj.weight[row.neuron]
        assert at[f"L{layer}N{row.neuron}@{row.position}"] == best(vector, row.position), row
        checked.add("neurons")
    assert checked == {"heads", "mlp", "neurons"} and len(set(at.values())) > 10
    assert any("Mary" in words.split(" ")[0] + words for words in at.values())
    for row in graph.attention.itertuples():
        layer, head = int(row.node[1]), int(row.node[3])
        assert row.attention == pytest.approx(float(cache["pattern", layer][0, head, row.position, row.source_position]), rel=1e-6)
    assert graph.attention.groupby(["node", "position"]).size().max() <= 5
    again = FlowGraph.from_json(graph.to_json())
    assert again.labels == graph.labels and again.attention.equals(graph.attention)
    page = graph.show().to_html()
    assert "looks at" in page and "writes" in page and "set_units(model" in page


def test_annotated_refuses_another_prompt(embedded: TransformerBridge) -> None:
    graph = flow_graph(embedded, "Mary and John went", rules="attnlrp")
    for other in ("Mary and Tom went", "Mary and John", ["Mary and John went"] * 2):
        with pytest.raises(RelevanceError, match="not the prompt that the graph is of"):
            graph.annotated(embedded, other)
    with pytest.raises(RelevanceError, match="sums over positions"):
        graph.sum_positions().annotated(embedded, "Mary and John went")


@pytest.mark.parametrize("family", ["gemma2", "llama", "neox", "bloom", "mixtral"])
def test_annotated_on_other_families(family: str) -> None:
    """What all heads and the MLPs write, and the final norm, are as in the model: one head's and one MLP's vector in fp64."""
    model = build_wider(family, dtype=torch.float64) if family in WIDER else getattr(models, f"build_{family}")(dtype=torch.float64)
    tokens = models.random_tokens(1)
    graph = flow_graph(model, tokens, TARGET, rules="gradient").prune(top=30).annotated(model, tokens)
    assert set(graph.labels) >= {f"{row.node}@{row.position}" for row in graph.nodes.itertuples() if row.component == "heads"}


def test_written_refuses_what_is_no_unit(gpt2: TransformerBridge) -> None:
    tokens = models.random_tokens(1)
    for node, said in (
        ("L0H0", "no head, MLP or neuron at a position"),
        ("L0.resid@1", "no head, MLP or neuron at a position"),
        ("L9H0@1", "out of range"),
        ("L0H9@1", "out of range"),
        ("L0N9999@1", "out of range"),
        ("L0H0@99", "out of range"),
    ):
        with pytest.raises(RelevanceError, match=said):
            written_tokens(gpt2, tokens, [node])
    with pytest.raises(RelevanceError, match="on one prompt, got 2"):
        written_tokens(gpt2, models.random_tokens(2), ["L0H0@1"])
