"""Information flow routes: contributions equal a plain loop over the model's own tensors, and routes stay connected under a threshold."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from analyses.benchmarks.tiny_models import FAMILIES, build, random_model
from analyses.edges.updates import proximity
from analyses.graph import FlowGraph, average, flow_graph, flow_graphs, head_routes
from analyses.models.loading import load_model
from lens_relevance import CoverageError, RelevanceError, logit_diff
from tests import models
from tests.precision import no_upcasts

TOKENS = models.random_tokens(1)
TARGET = logit_diff(3, 4)
Edges = dict[tuple[str, str, int, int], float]


@cache
def graph_of(family: str, threshold: float = 0.0) -> FlowGraph:
    with no_upcasts():
        return flow_graph(build(family), TOKENS, TARGET, kind="contribution", threshold=threshold)


# ---- the oracle: Hugging Face's module alone, run layer by layer, with loops over positions, heads and tokens


def distance_to_zero_and_back(part: Tensor, total: Tensor) -> float:
    """The proximity of one vector to another."""
    whole = sum(abs(float(x)) for x in total)
    apart = sum(abs(float(x) - float(p)) for x, p in zip(total, part, strict=True))
    return max(0.0, whole - apart)


class Oracle:
    """Inputs and outputs of every module of the plain model, by its name."""

    def __init__(self, family: str) -> None:
        one = FAMILIES[family]
        auto = AutoModelForMaskedLM if family == "bert" else AutoModelForCausalLM
        self.model: Any = random_model(auto.from_config, AutoConfig.for_model(one.model_type, **one.settings)).requires_grad_(False)
        self.seen: dict[str, tuple[Any, Any]] = {}
        for name, module in self.model.named_modules():
            module.register_forward_hook(self._note(name), with_kwargs=True)
        with no_upcasts(), torch.no_grad():
            self.attentions = self.model(TOKENS, output_attentions=True).attentions

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> None:
            given = inputs[0] if inputs else kwargs.get("hidden_states", kwargs.get("input_ids"))
            self.seen[name] = (given, output[0] if isinstance(output, tuple) else output)

        return hook

    def input(self, name: str) -> Tensor:
        return self.seen[name][0][0]

    def output(self, name: str) -> Tensor:
        return self.seen[name][1][0]


def normed(vector: Tensor, around: Tensor, weight: Tensor, eps: float, *, centred: bool) -> Tensor:
    """The linear part of a norm that reads `around`, of one vector."""
    centre = around.mean() if centred else 0.0
    own = vector.mean() if centred else 0.0
    return (vector - own) / ((around - centre).pow(2).mean() + eps).sqrt() * weight


def brought(oracle: Oracle, layer: int, values: Tensor, weight: Tensor, heads: int) -> dict[tuple[int, int, int], Tensor]:
    """(head, position, source) -> A v W_O, for values [pos, key-value head * d_head] and a weight [d_model, head * d_head]."""
    width = weight.shape[1] // heads
    group = heads // (values.shape[1] // width)
    found = {}
    for h in range(heads):
        for t in range(len(values)):
            for s in range(len(values)):
                if float(oracle.attentions[layer][0, h, t, s]) > 0:
                    value = values[s, (h // group) * width : (h // group + 1) * width]
                    found[h, t, s] = float(oracle.attentions[layer][0, h, t, s]) * (weight[:, h * width : (h + 1) * width] @ value)
    return found


Sums = list[tuple[str, Tensor, dict[str, Tensor], dict[tuple[int, int, int], Tensor], str, str]]
"""(state, sum, parts, brought, state that heads read, state that the MLP reads), from below."""


def gpt2_sums(oracle: Oracle) -> Sums:
    blocks = oracle.model.transformer.h
    sums: Sums = [_embeddings(oracle.output("transformer.wte"), oracle.output("transformer.wpe"))]
    for i, block in enumerate(blocks):
        path, width = f"transformer.h.{i}", oracle.model.config.n_embd
        entering, leaving = oracle.input(path), oracle.output(path)
        middle = oracle.input(f"{path}.ln_2")
        values = oracle.output(f"{path}.attn.c_attn")[:, 2 * width :]
        heads = brought(oracle, i, values, block.attn.c_proj.weight.T, oracle.model.config.n_head)
        bias = block.attn.c_proj.bias.expand_as(entering)
        sums += _block(i, len(blocks), entering, middle, leaving, {"bias": bias}, heads, oracle.output(f"{path}.mlp"))
    return sums


def llama_sums(oracle: Oracle) -> Sums:
    """Llama; Gemma 3 with its norms on the outputs of attention and MLP (their weights are 1 + w)."""
    layers, config = oracle.model.model.layers, oracle.model.config
    sums: Sums = [("L0.resid", oracle.input("model.layers.0"), {"embed": oracle.input("model.layers.0")}, {}, "", "")]
    for i, block in enumerate(layers):
        path = f"model.layers.{i}"
        entering, leaving = oracle.input(path), oracle.output(path)
        values, weight = oracle.output(f"{path}.self_attn.v_proj"), block.self_attn.o_proj.weight
        heads = brought(oracle, i, values, weight, config.num_attention_heads)
        written, mlp = oracle.output(f"{path}.self_attn"), oracle.output(f"{path}.mlp")
        if hasattr(block, "pre_feedforward_layernorm"):
            after, mlp = block.post_attention_layernorm, oracle.output(f"{path}.post_feedforward_layernorm")
            around = oracle.input(f"{path}.post_attention_layernorm")
            heads = {key: normed(x, around[key[1]], 1 + after.weight, after.eps, centred=False) for key, x in heads.items()}
            written = oracle.output(f"{path}.post_attention_layernorm")
        sums += _block(i, len(layers), entering, entering + written, leaving, {}, heads, mlp)
    return sums


def bert_sums(oracle: Oracle) -> Sums:
    """Every sum of BERT passes a LayerNorm: all its parts pass the linear part of it, and its own bias goes with the bias."""
    bert = oracle.model.bert
    given, norm = oracle.input("bert.embeddings.LayerNorm"), bert.embeddings.LayerNorm
    positions = oracle.seen["bert.embeddings.position_embeddings"][1][0]
    past = lambda x, around, norm: torch.stack(  # noqa: E731
        [normed(a, b, norm.weight, norm.eps, centred=True) for a, b in zip(x.expand_as(around), around, strict=True)]
    )
    parts = {"embed": past(given - positions, given, norm), "pos_embed": past(positions, given, norm), "bias": norm.bias.expand_as(given)}
    sums: Sums = [("L0.resid", oracle.output("bert.embeddings.LayerNorm"), parts, {}, "", "")]
    for i, block in enumerate(bert.encoder.layer):
        path = f"bert.encoder.layer.{i}"
        first, second = block.attention.output.LayerNorm, block.output.LayerNorm
        entering, leaving = oracle.input(path), oracle.output(f"{path}.output.LayerNorm")
        around, middle = oracle.input(f"{path}.attention.output.LayerNorm"), oracle.output(f"{path}.attention.output.LayerNorm")
        dense = block.attention.output.dense
        heads = brought(oracle, i, oracle.output(f"{path}.attention.self.value"), dense.weight, oracle.model.config.num_attention_heads)
        heads = {key: normed(x, around[key[1]], first.weight, first.eps, centred=True) for key, x in heads.items()}
        bias = past(dense.bias, around, first) + first.bias
        read, written = f"L{i}.resid", oracle.output(f"{path}.output.dense")
        sums.append((f"L{i}.resid_mid", middle, {read: past(entering, around, first), "bias": bias}, heads, read, ""))
        top, last = oracle.input(f"{path}.output.LayerNorm"), i == len(bert.encoder.layer) - 1
        parts = {f"L{i}.resid_mid": past(middle, top, second), "bias": second.bias.expand_as(top), f"L{i}.mlp": past(written, top, second)}
        sums.append((f"L{i}.resid_post" if last else f"L{i + 1}.resid", leaving, parts, {}, "", f"L{i}.resid_mid"))
    return sums


def _embeddings(embed: Tensor, positions: Tensor) -> Any:
    return "L0.resid", embed + positions, {"embed": embed, "pos_embed": positions.expand_as(embed)}, {}, "", ""


def _block(i: int, n: int, entering: Tensor, middle: Tensor, leaving: Tensor, more: Any, heads: Any, mlp: Tensor) -> Sums:
    after = f"L{i}.resid_post" if i == n - 1 else f"L{i + 1}.resid"
    first = (f"L{i}.resid_mid", middle, {f"L{i}.resid": entering, **more}, heads, f"L{i}.resid", "")
    return [first, (after, leaving, {f"L{i}.resid_mid": middle, f"L{i}.mlp": mlp}, {}, "", f"L{i}.resid_mid")]


def followed(sums: Sums, threshold: float) -> Edges:
    """All edges reached from the last position down, by the paper's procedure."""
    last = sums[-1][0]
    position = TOKENS.shape[1] - 1
    edges: Edges = {(last, "logits", position, position): 1.0}
    reached: defaultdict[str, set[int]] = defaultdict(set, {last: {position}})
    for into, total, parts, heads, heads_read, mlp_reads in reversed(sums):
        layer = into.split(".")[0] if not parts.keys() & {"embed"} else ""
        for t in reached[into]:
            near = {(name, t): distance_to_zero_and_back(part[t], total[t]) for name, part in parts.items()}
            near_heads = {(h, s): distance_to_zero_and_back(x, total[t]) for (h, at, s), x in heads.items() if at == t}
            whole = sum(near.values()) + sum(near_heads.values())
            for (name, _), size in near.items():
                if size > 0 and size / whole >= threshold:
                    edges[name, into, t, t] = size / whole
                    if name.endswith("mlp"):
                        edges[mlp_reads, name, t, t] = size / whole
                        name = mlp_reads
                    reached[name].add(t)
            for (h, s), size in near_heads.items():
                if size > 0 and size / whole >= threshold:
                    head = f"{layer}H{h}"
                    edges[heads_read, head, t, s] = size / whole
                    edges[head, into, t, t] = edges.get((head, into, t, t), 0.0) + size / whole
                    reached[heads_read].add(s)
    return edges


SUMS = {"gpt2": gpt2_sums, "llama": llama_sums, "gemma3": llama_sums, "bert": bert_sums}


def table(graph: FlowGraph) -> Edges:
    return {(e.source, e.target, e.position, e.source_position): e.score for e in graph.edges.itertuples()}


@pytest.mark.parametrize("family", list(SUMS))
def test_contributions_equal_a_loop_over_the_models_own_tensors(family: str) -> None:
    expected = followed(SUMS[family](Oracle(family)), 0.0)
    found = table(graph_of(family))
    assert found.keys() == expected.keys() and len(found) > 80
    assert max(abs(found[key] - expected[key]) for key in found) < 1e-9
    assert sum(".resid" in source and "H" in target for source, target, *_ in found) > 20, "heads take part"


@pytest.mark.parametrize("threshold", [0.05, 0.15])
def test_a_threshold_is_the_papers_search_from_the_logits_down(threshold: float) -> None:
    expected = followed(SUMS["gpt2"](Oracle("gpt2")), threshold)
    found = table(graph_of("gpt2", threshold))
    assert found.keys() <= expected.keys() and 10 < len(found) < len(graph_of("gpt2").edges)
    assert max(abs(found[key] - expected[key]) for key in found) < 1e-9
    alive: set[tuple[str, int]] = set()  # what is left of the search without states that no input reaches
    for (source, target, t, s), _ in sorted(expected.items(), key=lambda item: _order(item[0])):
        if source in ("embed", "pos_embed", "bias") or (source, s) in alive:
            alive.add((target, t))
    assert found.keys() == {key for key in expected if key[0] in ("embed", "pos_embed", "bias") or (key[0], key[3]) in alive}


def _order(edge: tuple[str, str, int, int]) -> tuple[int, int]:
    """By the node that an edge enters, in the order of computation."""
    target = edge[1]
    if target == "logits":
        return 10**6, 0
    layer = int(target[1 : 2 if target[2:3] in ".H" else 3])
    return layer, next(i for i, mark in enumerate((".resid@", "H", ".resid_mid@", ".mlp@", ".resid_post@")) if mark in f"{target}@")


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gemma2", "gemma3", "olmo2", "bert", "neox_parallel", "gptj", "opt", "bloom", "mixtral", "gpt_oss"]
)
def test_contributions_to_a_state_add_up_to_one(family: str) -> None:
    graph = graph_of(family)
    entering = graph.edges[graph.edges["target"].str.contains("resid")].groupby(["target", "position"])["score"].sum()
    assert len(entering) > 10 and np.allclose(entering, 1.0, atol=1e-12)
    inputs = graph.nodes[graph.nodes["component"].isin(["embed", "pos_embed", "bias"])]["score"].sum()
    assert inputs == pytest.approx(1.0), "what reaches the logits begins at the inputs"


def test_proximity_of_hand_made_vectors() -> None:
    total = torch.tensor([2.0, -1.0])
    parts = torch.tensor([[2.0, -1.0], [1.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert proximity(parts, total).tolist() == [3.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "neox_parallel"])
@pytest.mark.parametrize("threshold", [0.03, 0.1])
def test_every_edge_lies_on_a_route_from_a_token_to_the_logits(family: str, threshold: float) -> None:
    graph = graph_of(family, threshold)
    assert graph.edges["score"].min() >= threshold
    network = graph.to_networkx()
    inputs = [n for n in network if n.split("@")[0] in ("embed", "pos_embed", "bias")]
    from_inputs = set(inputs).union(*(set(_reach(network, n)) for n in inputs))
    to_logits = set(_reach(network.reverse(), f"logits@{TOKENS.shape[1] - 1}"))
    assert inputs and set(network) == from_inputs and set(network) - to_logits == {f"logits@{TOKENS.shape[1] - 1}"}


def _reach(network: Any, start: str) -> list[str]:
    found, todo = [], [start]
    while todo:
        for after in network.successors(todo.pop()):
            if after not in found:
                found.append(after)
                todo.append(after)
    return found


def test_one_graph_serves_paths_pruning_files_and_pictures(tmp_path: Path) -> None:
    graph = graph_of("gpt2", 0.02)
    paths = graph.paths(5)
    assert len(paths) == 5 and paths["path"].str.endswith("logits@5").all() and 0 < paths["share"].sum() <= 1 + 1e-12
    small = graph.prune(top=20)
    assert 0 < len(small.edges) <= 20
    assert FlowGraph.from_json(graph.to_json()) == graph
    graph.to_neuronpedia(tmp_path / "routes.json", slug="routes")
    assert FlowGraph.from_neuronpedia(tmp_path / "routes.json") == graph
    graph.to_graphml(tmp_path / "routes.graphml")
    page = graph.show().to_html()
    assert "What makes up what the logits read" in page and "middle stream" in page and "L0.resid_mid" in page
    summed = graph.sum_positions()
    assert not summed.by_position and len(summed.edges) < len(graph.edges)


def test_where_several_positions_are_read_each_gets_its_part() -> None:
    graph = flow_graph(build("gpt2"), TOKENS, lambda logits: logits[:, 2, 3] + logits[:, 4, 3], kind="contribution")
    ends = graph.edges[graph.edges["target"] == "logits"].set_index("position")["score"]
    assert ends.to_dict() == {2: 0.5, 4: 0.5}


def test_graphs_of_several_prompts_are_those_of_each() -> None:
    model, rows = build("gpt2"), models.random_tokens(3)
    graphs = flow_graphs(model, rows, TARGET, kind="contribution", threshold=0.02)
    assert all(g == flow_graph(model, rows[i : i + 1], TARGET, kind="contribution", threshold=0.02) for i, g in enumerate(graphs))
    assert average(graphs).edges["frequency"].max() == 1.0


def test_what_does_not_fit_is_refused() -> None:
    model = build("gpt2")
    with pytest.raises(RelevanceError, match="without rules"):
        flow_graph(model, TOKENS, TARGET, kind="contribution", rules="attnlrp")
    with pytest.raises(RelevanceError, match="kind is 'relevance' or 'contribution'"):
        flow_graph(model, TOKENS, TARGET, kind="flow")
    with pytest.raises(RelevanceError, match="threshold 0.99 leaves no route"):
        flow_graph(model, TOKENS, TARGET, kind="contribution", threshold=0.99)
    with pytest.raises(RelevanceError, match="reads no position"):
        flow_graph(model, TOKENS, lambda logits: logits[:, -1, 0] * 0.0, kind="contribution")
    with pytest.raises(CoverageError, match="not the sum"):
        flow_graph(build("granite", residual_multiplier=0.5), TOKENS, TARGET, kind="contribution")
    with pytest.raises(RelevanceError, match="other units"):
        flow_graph(model, TOKENS, TARGET).diff(graph_of("gpt2"))


# ---- which heads are on the routes of a data set


def test_head_routes_count_the_heads_of_each_graph() -> None:
    model, rows = build("gpt2"), models.random_tokens(4)
    table = head_routes(model, rows, TARGET, threshold=0.1).set_index("node")
    assert len(table) == 8
    graphs = [flow_graph(model, rows[i : i + 1], TARGET, kind="contribution", threshold=0.1) for i in range(4)]
    assert 0.0 < table["on_route"].mean() < 1.0, "a case in which it matters"
    for name, row in table.iterrows():
        on = [graph for graph in graphs if name in set(graph.nodes["node"])]
        assert row["on_route"] == len(on) / 4
        assert row["importance"] == pytest.approx(sum(g.edges.loc[g.edges["target"] == name, "score"].max() for g in on) / 4)
        assert row["through"] == pytest.approx(sum(g.nodes.loc[g.nodes["node"] == name, "score"].sum() for g in on) / 4)


def test_head_routes_of_prompts_of_several_lengths() -> None:
    model = load_model("embedded")
    prompts = ["When Mary and John went to the store, John gave a drink to", "Mary and John went to the store"]
    both = head_routes(model, prompts, threshold=0.03)
    each = [head_routes(model, [one], threshold=0.03) for one in prompts]
    for column in ("on_route", "importance", "through"):
        mean = (each[0].set_index("node")[column] + each[1].set_index("node")[column]) / 2
        assert np.allclose(both.set_index("node")[column], mean[both["node"]], atol=1e-6)
