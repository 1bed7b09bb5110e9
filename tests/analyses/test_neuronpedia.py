"""Neuronpedia's graphs: valid against its schema, equal to the flow graph there and back, files of other tools read with care."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pandas as pd
import pytest
from transformer_lens.model_bridge import TransformerBridge

from analyses.graph import FlowGraph, flow_graph
from analyses.graph.tables import nodes_frame
from lens_relevance import RelevanceError, logit_diff

TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer"}


def an_object(needed: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": needed | (more or {}), "required": list(needed)}


def a_list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


MAYBE_NUMBER = {"type": ["number", "null"]}
MARGINAL = a_list({"type": "array", "minItems": 2, "maxItems": 2, "items": [TEXT, NUMBER]})
TRACING = {
    "pair_wise_contributors": a_list({"type": "array", "minItems": 3, "maxItems": 3, "items": [TEXT, TEXT, NUMBER]}),
    "top_q_marginal_contributors": MARGINAL,
    "top_k_marginal_contributors": MARGINAL,
}
GENERATOR = {"type": "object", "properties": {"name": TEXT, "version": TEXT, "url": TEXT, "email": TEXT}}
INFO = {"type": "object", "properties": {"description": TEXT, "creator_name": TEXT, "generator": GENERATOR, "create_time_ms": NUMBER}}
METADATA = {"slug": TEXT, "scan": TEXT, "prompt_tokens": a_list(TEXT), "prompt": TEXT}
QUERY = {"pinnedIds": a_list(TEXT), "supernodes": {"type": "array"}, "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT}
NODE = {
    "node_id": TEXT,
    "feature": {"type": ["integer", "null"]},
    "layer": {"type": ["string", "integer"]},
    "ctx_idx": COUNT,
    "feature_type": TEXT,
    "jsNodeId": TEXT,
    "clerp": TEXT,
}
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    **an_object(
        {
            "metadata": an_object(METADATA, {"node_threshold": NUMBER, "info": INFO, "generation_settings": {"type": "object"}}),
            "qParams": {"type": "object", "properties": QUERY},
            "nodes": a_list(
                an_object(NODE, {"influence": MAYBE_NUMBER, "activation": MAYBE_NUMBER, "qk_tracing_results": an_object(TRACING)})
            ),
            "links": a_list(an_object({"source": TEXT, "target": TEXT, "weight": NUMBER})),
        }
    ),
}
"""Fields and types as Neuronpedia publishes them (graph-schema.json), with what it requires of a node applied to each node."""

PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def graph(_embedded: TransformerBridge) -> FlowGraph:
    found = flow_graph(_embedded, PROMPT, logit_diff(" Mary", " John"), reference=PROMPT.replace("John gave", "Mary gave"))
    return found.prune(top=80).annotated(_embedded, PROMPT)


def random_graph(seed: int) -> FlowGraph:
    """Any connected mixture of components, with names, scores and texts drawn at random."""
    chance = np.random.default_rng(seed)
    n_layers, n_heads, n_pos = (int(chance.integers(1, n)) for n in (5, 4, 6))
    position = lambda: int(chance.integers(n_pos))  # noqa: E731
    edges, sinks, neurons = [], [], []

    def edge(source: str, target: str, at: int, source_at: int | None = None) -> None:
        edges.append((source, target, at, at if source_at is None else source_at, float(chance.standard_normal())))

    for layer in range(n_layers):
        for head in range(n_heads):
            name, at = f"L{layer}H{head}", position()
            edge("embed", f"{name}.q", at)
            edge(f"{name}.q", name, at)
            for source in sorted({int(chance.integers(at + 1)) for _ in range(3)}):
                for reader in "kv":
                    edge("embed", f"{name}.{reader}", source)
                    edge(f"{name}.{reader}", name, at, source)
            edge(name, "logits", at)
            sinks.append((name, at, "softmax", float(chance.standard_normal())))
        at = position()
        edge("embed", f"L{layer}.mlp.in", at)
        edge(f"L{layer}.mlp.in", f"L{layer}.mlp", at)
        edge(f"L{layer}.mlp", "logits", at)
        neurons += [(f"L{layer}.mlp", at, int(n), float(chance.standard_normal())) for n in chance.choice(50, 3, replace=False)]
    frame = pd.DataFrame(edges, columns=["source", "target", "position", "source_position", "score"])
    frame = frame.drop_duplicates(["source", "target", "position", "source_position"], ignore_index=True)
    ends = {(row.source, row.source_position) for row in frame.itertuples()} | {(row.target, row.position) for row in frame.itertuples()}
    tokens = tuple(str(chance.choice([" Mary", "\n", '"</script>', "été", "\u202e", "a\\b"])) for _ in range(n_pos))
    nodes = pd.DataFrame([(*end, float(chance.standard_normal())) for end in sorted(ends)], columns=["node", "position", "score"])
    return FlowGraph(
        edges=frame,
        nodes=nodes_frame(nodes, tokens),
        sinks=pd.DataFrame(sinks, columns=["node", "position", "sink", "score"]),
        neurons=pd.DataFrame(neurons, columns=["node", "position", "neuron", "score"]),
        tokens=tokens,
        value=float(chance.standard_normal()),
        info={"model": "random", "target": "a target"},
        labels={f"L0H0@{row.position}": "' Mary'" for row in nodes.itertuples() if row.node == "L0H0"},
    )


def test_a_hundred_random_graphs_are_valid_and_come_back_equal(tmp_path: Path) -> None:
    validator = jsonschema.Draft7Validator(SCHEMA)
    sizes = set()
    for seed in range(100):
        graph = random_graph(seed)
        path = tmp_path / f"{seed}.json"
        graph.to_neuronpedia(path, slug=f"graph-{seed}")
        content = json.loads(path.read_text())
        assert list(validator.iter_errors(content)) == []
        ids = [node["node_id"] for node in content["nodes"]]
        assert len(set(ids)) == len(ids) == len(graph.nodes) + len(graph.neurons)
        assert len({node["jsNodeId"] for node in content["nodes"]}) == len(ids)
        back = FlowGraph.from_neuronpedia(path, scan="random")
        assert back == graph and back.labels == graph.labels and back.info == graph.info
        sizes.add(len(graph.edges))
    assert len(sizes) > 20


def test_the_schema_notices_what_is_wrong() -> None:
    content = random_graph(0).to_neuronpedia(slug="one")
    validator = jsonschema.Draft7Validator(SCHEMA)
    for change in (
        lambda c: c["nodes"][0].pop("clerp"),
        lambda c: c["links"][0].update(weight="1"),
        lambda c: c["metadata"].pop("scan"),
        lambda c: c["nodes"][0].update(ctx_idx=1.5),
    ):
        wrong = json.loads(json.dumps(content))
        change(wrong)
        assert list(validator.iter_errors(wrong))


def test_scores_and_links_of_a_real_graph(graph: FlowGraph, tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    content = graph.to_neuronpedia(path, slug="mary", scan="embedded-model", token_prob=0.9)
    jsonschema.validate(content, SCHEMA)
    named = {node["node_id"]: (node["name"], node["ctx_idx"]) for node in content["nodes"]}
    weights: dict[tuple[Any, Any], float] = {}
    for link in content["links"]:
        weights[named[link["source"]], named[link["target"]]] = link["weight"]
    split = 0
    for row in graph.edges.itertuples():
        ends = (row.source, row.source_position), (row.target, row.position)
        inside = graph.neurons[(graph.neurons["node"] == row.target) & (graph.neurons["position"] == row.position)]
        by_neurons = 0.0
        for neuron in inside.itertuples() if str(row.source).endswith(".mlp.in") else ():
            middle = (f"{row.target[:-4]}N{neuron.neuron}", row.position)
            assert weights[ends[0], middle] == weights[middle, ends[1]] == neuron.score
            by_neurons, split = by_neurons + neuron.score, split + 1
        assert weights[ends] + by_neurons == pytest.approx(row.score, abs=1e-12)
    assert split > 10
    scores = {(node["name"], node["ctx_idx"]): node["score"] for node in content["nodes"]}
    for row in graph.nodes.itertuples():
        assert scores[row.node, row.position] == row.score
    layers = {node["name"]: node["layer"] for node in content["nodes"]}
    assert {name[1] == layer for name, layer in layers.items() if name.startswith("L")} == {True} and layers["embed"] == "E"
    assert {"0", "1"} < set(layers.values())
    answer = next(node for node in content["nodes"] if node["feature_type"] == "logit")
    assert answer["is_target_logit"] and answer["token_prob"] == 0.9 and "' Mary'" in answer["clerp"]
    assert any(node["clerp"].startswith("L1H3: writes '") for node in content["nodes"])
    assert content["metadata"]["info"]["generator"]["name"] == "lens_relevance"
    assert FlowGraph.from_neuronpedia(path) == graph
    assert FlowGraph.from_neuronpedia(path).show().to_html().count("L1H3") > 1


def test_influence_is_the_share_that_a_node_and_the_stronger_ones_hold(graph: FlowGraph) -> None:
    content = graph.to_neuronpedia(slug="mary")
    influences = {(n["name"], n["ctx_idx"]): n["influence"] for n in content["nodes"] if n["influence"] is not None}
    inner = graph.nodes[~graph.nodes["component"].isin(["embed", "logits"])]
    total = inner["score"].abs().sum()
    for row in inner.itertuples():
        stronger, as_strong = (
            inner.loc[inner["score"].abs() > limit, "score"].abs().sum() for limit in (abs(row.score), abs(row.score) - 1e-12)
        )
        assert (stronger + abs(row.score)) / total - 1e-9 <= influences[row.node, row.position] <= as_strong / total + 1e-9
    assert max(influences.values()) == pytest.approx(1)


def test_query_and_key_contributors(graph: FlowGraph) -> None:
    """Each writer's part of a key or query, times the share of what leaves it that this head takes at this position."""
    nodes = {node["node_id"]: node for node in graph.to_neuronpedia(slug="mary")["nodes"]}
    edges, seen = graph.edges, 0
    for node in nodes.values():
        if node["feature_type"] != "attention head":
            continue
        head, at, tracing = node["name"], node["ctx_idx"], node["qk_tracing_results"]
        into = edges[(edges["target"] == head) & (edges["position"] == at)]
        for letter, listed in (("q", "top_q_marginal_contributors"), ("k", "top_k_marginal_contributors")):
            expected: dict[tuple[str, int, int], float] = {}
            for taken in into[into["source"] == f"{head}.{letter}"].itertuples():
                reader = (graph.nodes["node"] == taken.source) & (graph.nodes["position"] == taken.source_position)
                stays = graph.sinks[(graph.sinks["node"] == taken.source) & (graph.sinks["position"] == taken.source_position)]
                leaves = graph.nodes.loc[reader, "score"].item() + stays["score"].sum()
                given = edges[(edges["target"] == taken.source) & (edges["position"] == taken.source_position)]
                for writer in given.itertuples():
                    expected[writer.source, writer.source_position, taken.source_position] = writer.score * taken.score / leaves
            strongest = sorted(expected.items(), key=lambda item: -abs(item[1]))[:10]
            found = [(nodes[name]["name"], nodes[name]["ctx_idx"], score) for name, score in tracing[listed]]
            assert len(found) == len(strongest)
            for (name, position, score), ((source, source_at, _), value) in zip(found, strongest, strict=True):
                assert (name, position) == (source, source_at) and score == pytest.approx(value, rel=1e-9)
                seen += 1
        for query, key, score in tracing["pair_wise_contributors"]:
            row = into[(into["source"] == f"{head}.k") & (into["source_position"] == nodes[key]["ctx_idx"])]
            assert row["score"].item() == score and nodes[query]["ctx_idx"] == at
    assert seen > 10


def test_a_querys_contributors_add_up_where_nothing_is_pruned(_embedded: TransformerBridge) -> None:
    """The softmax is bilinear under deeplift here: what enters a query leaves it, but for its bias."""
    whole = flow_graph(_embedded, "Mary and John went", logit_diff(" Mary", " John"), reference="Mary and Tom went")
    content = whole.to_neuronpedia(slug="whole")
    checked = 0
    for node in content["nodes"]:
        if node["feature_type"] == "attention head" and 0 < len(found := node["qk_tracing_results"]["top_q_marginal_contributors"]) < 10:
            edge = whole.edges[(whole.edges["source"] == f"{node['name']}.q") & (whole.edges["position"] == node["ctx_idx"])]
            assert sum(score for _, score in found) == pytest.approx(edge["score"].sum(), abs=1e-5)
            checked += 1
    assert checked > 5


def foreign() -> dict[str, Any]:
    """A graph as circuit-tracer writes it: two features, an error node, a token, two logits."""
    node = {
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "is_target_logit": False,
        "token_prob": 0.0,
        "clerp": "",
        "influence": 0.5,
        "activation": 2.0,
    }
    kinds = [
        ("E_5_0", 0, "E", "embedding"),
        ("0_253_1", 32131, "0", "cross layer transcoder"),
        ("1_7_1", 44, "1", "cross layer transcoder"),
        ("1_-1_1", -1, "1", "mlp reconstruction error"),
        ("3_99_1", 99, "3", "logit"),
        ("3_12_1", 12, "3", "logit"),
    ]
    nodes = [
        node
        | {"node_id": name, "feature": feature, "layer": layer, "ctx_idx": int(name[-1]), "feature_type": kind, "jsNodeId": f"{name}-0"}
        for name, feature, layer, kind in kinds
    ]
    nodes[1]["clerp"], nodes[4]["clerp"], nodes[4]["is_target_logit"] = "capitals", 'Output " Paris" (p=0.7)', True
    links = [("E_5_0", "0_253_1", 1.5), ("0_253_1", "1_7_1", 0.5), ("1_7_1", "3_99_1", 2.0)]
    links += [("1_-1_1", "3_99_1", -0.25), ("1_7_1", "3_12_1", 0.75)]
    return {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["<bos>", " of"], "prompt": " of"},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [dict(zip(("source", "target", "weight"), link, strict=True)) for link in links],
    }


def written_to(folder: Path, content: Any) -> Path:
    path = folder / "graph.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_graph_of_another_tool_is_read_and_drawn(tmp_path: Path) -> None:
    graph = FlowGraph.from_neuronpedia(written_to(tmp_path, foreign()))
    assert set(graph.nodes["node"]) == {"embed", "L0F253", "L1F7", "L1.error", "logit 99", "logit 12"}
    assert graph.value == 2.5 and graph.info["target"] == 'Output " Paris" (p=0.7)'
    assert graph.labels["L0F253@1"] == "capitals"
    assert "L0F253" in graph.show().to_html()


def test_paths_of_a_graph_of_another_tool(tmp_path: Path) -> None:
    """Shares by hand: 3 enters the two logits, 2.75 of it from the one feature that the token reaches, 0.25 from the error."""
    graph = FlowGraph.from_neuronpedia(written_to(tmp_path, foreign()))
    found = graph.paths().set_index("path")
    by_token = "embed@0 -> L0F253@1 -> L1F7@1 -> logit"
    assert found["share"].to_dict() == pytest.approx(
        {f"{by_token} 99@1": 2 / 3, f"{by_token} 12@1": 0.75 / 3, "L1.error@1 -> logit 99@1": 0.25 / 3}, abs=1e-12
    )
    assert found["weakest"].to_dict() == {f"{by_token} 99@1": 0.5, f"{by_token} 12@1": 0.5, "L1.error@1 -> logit 99@1": -0.25}
    kept = graph.prune(top=4)
    assert set(kept.nodes["node"]) == {"embed", "L0F253", "L1F7", "logit 99", "logit 12"} and len(kept.edges) == 4
    path = tmp_path / "again.json"
    content = graph.to_neuronpedia(path, slug="again")
    assert {"3_99_1", "3_12_1", "0_253_1"} <= {node["node_id"] for node in content["nodes"]}
    assert FlowGraph.from_neuronpedia(path) == graph
    strange = foreign()
    strange["nodes"][3]["feature_type"] = "lorsa error"
    with pytest.raises(RelevanceError, match="'L1.lorsa error' is a group, .* or another tool's node"):
        FlowGraph.from_neuronpedia(written_to(tmp_path, strange)).paths()


def damage(content: dict[str, Any], how: str) -> Any:
    node, link = content["nodes"][1], content["links"][1]
    changes: dict[str, Any] = {
        "no nodes": lambda: content.pop("nodes"),
        "an unknown part": lambda: content.update(extra=1),
        "an unknown field of a node": lambda: node.update(colour="red"),
        "an unknown field of a link": lambda: link.update(colour="red"),
        "no prompt": lambda: content["metadata"].pop("prompt_tokens"),
        "a token that is no text": lambda: content["metadata"].update(prompt_tokens=["a", 1]),
        "a place beyond the prompt": lambda: node.update(ctx_idx=7),
        "a node twice": lambda: content["nodes"].append(dict(node)),
        "a link to nowhere": lambda: link.update(target="\x1b[31m<b>"),
        "a weight in words": lambda: link.update(weight="much"),
        "a weight that is infinite": lambda: link.update(weight=float("inf")),
        "links that are no list": lambda: content.update(links={}),
        "nodes that are no objects": lambda: content["nodes"].append([1]),
    }
    changes[how]()
    return content


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no nodes", "lacks 'nodes'"),
        ("an unknown part", "unknown field 'extra'"),
        ("an unknown field of a node", "node 1 has the unknown field 'colour'"),
        ("an unknown field of a link", "link 1 has the unknown field 'colour'"),
        ("no prompt", "lack scan or prompt_tokens"),
        ("a token that is no text", "1 is no text"),
        ("a place beyond the prompt", "stands at position 7, and the prompt has 2 tokens"),
        ("a node twice", "is there twice"),
        ("a link to nowhere", r"link 1 has the target '\\x1b\[31m<b>', which is no node"),
        ("a weight in words", "the weight of link 1 is 'much', not a number"),
        ("a weight that is infinite", "the weight of link 1 is inf, not a number"),
        ("links that are no list", "links are no list"),
        ("nodes that are no objects", "node 6 is not an object"),
    ],
)
def test_malformed_graphs(tmp_path: Path, how: str, said: str) -> None:
    with pytest.raises(RelevanceError, match=said):
        FlowGraph.from_neuronpedia(written_to(tmp_path, damage(foreign(), how)))


def test_other_files_and_models(tmp_path: Path) -> None:
    for content, said in (
        ("{", "cannot be read as an attribution graph"),
        ("[]", "not an object"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
    ):
        with pytest.raises(RelevanceError, match=said):
            FlowGraph.from_neuronpedia(written_to(tmp_path, content))
    with pytest.raises(RelevanceError, match="of the model 'gemma-2-2b', not of 'gpt2'"):
        FlowGraph.from_neuronpedia(written_to(tmp_path, foreign()), scan="gpt2")
    hostile = foreign()
    hostile["nodes"][1]["clerp"] = "</script><script>alert(1)</script>"
    page = FlowGraph.from_neuronpedia(written_to(tmp_path, hostile)).show().to_html()
    assert "<script>alert(1)" not in page


def test_graphs_without_places_are_refused(graph: FlowGraph) -> None:
    with pytest.raises(RelevanceError, match="sums over positions"):
        graph.sum_positions().to_neuronpedia(slug="one")
    with pytest.raises(RelevanceError, match="is a group of nodes"):
        graph.group({"movers": ["L1H3", "L1H1"]}).to_neuronpedia(slug="one")
