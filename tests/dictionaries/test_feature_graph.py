"""Graphs over heads and features: every node hands on what enters it, and every edge is what flows through both of its ends."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from typer.testing import CliRunner

from analyses.cli import app
from analyses.dictionaries import save_dictionary
from analyses.embedded import load_embedded
from analyses.graph import FlowGraph, flow_graph
from lens_relevance import CoverageError, Dictionary, RelevanceError, logit_diff, propagate, read_dictionaries
from tests.dictionaries.random_dictionaries import KINDS, random_dictionary
from tests.dictionaries.test_relevance import LAYERS, dictionaries
from tests.engine.families import TARGET, build, exact, inputs_and_reference
from tests.models import build_gpt2

TOKENS, OTHER = inputs_and_reference()
TOKENS, OTHER = TOKENS[:1], OTHER[:1]
PLACES = ("transcoders", "skip", "resid_pre", "resid_post", "attn_out", "mlp_out", "cross_layer")


def given_at(model: TransformerBridge, place: str, kind: str = "relu", **settings: object) -> list[Dictionary]:
    """Dictionaries of all layers."""
    if place != "attn_out":
        return dictionaries(model, place, kind, **settings)
    return [random_dictionary(f"blocks.{i}.hook_attn_out", d_in=model.cfg.d_model, kind=kind, seed=100 * i) for i in LAYERS]


def unbalanced(graph: FlowGraph) -> pd.DataFrame:
    """Of every node what enters it, what leaves it and what stays, and by how much its two sums are off."""
    sums = {
        "score": graph.nodes.set_index(["node", "position"])["score"],
        "enters": graph.edges.groupby(["target", "position"])["score"].sum().rename_axis(["node", "position"]),
        "leaves": graph.edges.groupby(["source", "source_position"])["score"].sum().rename_axis(["node", "position"]),
        "stays": graph.sinks.groupby(["node", "position"])["score"].sum(),
    }
    table = pd.DataFrame(sums).fillna(0.0).reset_index()
    table["component"] = table["node"].map(graph.nodes.drop_duplicates("node").set_index("node")["component"])
    reader = table["component"].isin(["q", "k", "v", "mlp.in"])
    source = table["component"].isin(["embed", "pos_embed", "bias", "error"])
    table["off_above"] = (table["leaves"] - table["score"] - table["stays"].where(reader, 0.0)).where(table["component"] != "logits", 0.0)
    table["off_below"] = (table["score"] - table["enters"] - table["stays"].where(~reader, 0.0)).where(~source, 0.0)
    return table


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_what_enters_a_node_leaves_it(family: str, place: str) -> None:
    with exact(family):
        model = build(family, n_layers=3)
        given = given_at(model, place)
        for n_features in (0, 6, 10**6):
            graph = flow_graph(model, TOKENS, TARGET, reference=OTHER, dictionaries=given, n_features=n_features)
            table = unbalanced(graph)
            assert float(table["off_above"].abs().max()) < 1e-9 and float(table["off_below"].abs().max()) < 1e-9
            at_logits = graph.edges.loc[graph.edges["target"] == "logits", "score"].sum()
            stays = graph.sinks.loc[graph.sinks["node"] == "logits", "score"].sum()
            assert float(at_logits + stays) == pytest.approx(graph.value, rel=1e-9)
            size = table.groupby("component")["score"].apply(lambda score: score.abs().max())
            assert size["features"] > 1e-3 and size["error"] > 1e-3
            assert ("skip" in size) == (place == "skip")
            assert ("mlp" in size) == (place not in ("transcoders", "skip", "cross_layer"))
            assert len(graph.features) == 0 if n_features == 0 else graph.features["activation"].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation_and_a_single_prompt(kind: str) -> None:
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    for place, rules, reference in (("transcoders", None, OTHER), ("resid_pre", "attnlrp", None), ("mlp_out", "gradient", None)):
        settings = {"normalization": "layer_norm"} if place == "resid_pre" and kind != "gated" else {}
        given = given_at(model, place, kind, **settings)
        table = unbalanced(flow_graph(model, TOKENS, TARGET, rules=rules, reference=reference, dictionaries=given, n_features=5))
        assert float(table["off_above"].abs().max()) < 1e-9 and float(table["off_below"].abs().max()) < 1e-9
        assert table.loc[table["component"] == "features", "score"].abs().max() > 1e-3


def test_edges_are_what_flows_through_both_ends() -> None:
    """Against conditional passes: into q, k and v of a head, from heads, features, errors and tokens into a feature."""
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    given = given_at(model, "transcoders")
    below, point = given[0].point_out[0], given[1].point_out[0]
    graph = flow_graph(model, TOKENS, TARGET, reference=OTHER, dictionaries=given, n_features=10**6)
    edges = graph.edges.set_index(["source", "target", "position"])["score"]

    def flows(through: dict[str, dict[str, object]], names: list[str] | None = None):  # type: ignore[no-untyped-def]
        names = [] if names is None else names
        return propagate(model, TOKENS, TARGET, reference=OTHER, dictionaries=given, through=through, names_filter=["hook_embed", *names])

    compared = 0
    for read in "qkv":
        position = 4
        cache = flows({f"blocks.1.attn.hook_{read}": {"head": [2], "position": [position]}})
        expected = cache.features(below).to_dense()[0, position]
        for feature in expected.nonzero().flatten().tolist():
            assert edges[f"L0F{feature}", f"L1H2.{read}", position] == pytest.approx(float(expected[feature]), rel=1e-9, abs=1e-12)
            compared += 1
        error = float(cache.error(below)[0, position])
        assert edges["L0.error", f"L1H2.{read}", position] == pytest.approx(error, rel=1e-9) and abs(error) > 1e-6
    rows = graph.nodes[graph.nodes["node"].str.startswith("L1F") & (graph.nodes["position"] == 4)]
    for row in rows[rows["score"].abs() > 1e-4].head(4).itertuples():
        feature, position = int(row.node.removeprefix("L1F")), row.position
        only = {point: {"feature": [feature], "position": [position]}}
        cache = flows(only, ["blocks.1.attn.hook_z"])
        by_heads = flows(only | {"blocks.1.attn.hook_z": {"position": [*range(TOKENS.shape[1])]}})
        heads = cache["z", 1][0, position].sum(-1)
        for head, score in enumerate(heads.tolist()):
            assert edges[f"L1H{head}", row.node, position] == pytest.approx(score, rel=1e-9, abs=1e-12)
        direct = (cache.features(below).to_dense() - by_heads.features(below).to_dense())[0, position]
        for below_it in direct.nonzero().flatten().tolist():
            found = edges.get((f"L0F{below_it}", row.node, position), 0.0)
            assert found == pytest.approx(float(direct[below_it]), rel=1e-7, abs=1e-12)
        assert float(direct.abs().max()) > 1e-6
        error = float((cache.error(below) - by_heads.error(below))[0, position])
        assert edges["L0.error", row.node, position] == pytest.approx(error, rel=1e-7)
        compared += len(heads)
    assert compared > 20


PROMPT = "When Mary and John went to the store, John gave a drink to"
AGAINST = "When Mary and John went to the store, Mary gave a drink to"


def test_a_graph_over_features_in_files(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = load_embedded(dtype=torch.float64)
    given = [
        random_dictionary(f"blocks.{i}.ln2.hook_out", f"blocks.{i}.hook_mlp_out", d_in=64, seed=100 * i, skip=i == 1) for i in range(4)
    ]
    graph = flow_graph(model, PROMPT, logit_diff(" Mary", " John"), reference=AGAINST, dictionaries=given)
    kept = graph.prune(top=60).annotated(model, PROMPT, dictionaries=given)
    features = kept.nodes[kept.nodes["node"].str.fullmatch(r"L\d+F\d+")]
    assert len(features) > 3 and set(features["component"]) == {"features"} and set(features["layer"]) <= {0, 1, 2, 3}
    assert all(f"{row.node}@{row.position}" in kept.labels for row in features.itertuples())
    kept.to_json(tmp_path / "graph.json")
    assert FlowGraph.from_json(tmp_path / "graph.json") == kept
    written = kept.to_neuronpedia(tmp_path / "np.json", slug="test")
    assert FlowGraph.from_neuronpedia(tmp_path / "np.json") == kept
    nodes = {(node["name"], node["ctx_idx"]): node for node in written["nodes"]}
    for row in features.itertuples():
        node = nodes[row.node, row.position]
        assert node["feature_type"] == "cross layer transcoder" and node["activation"] is not None
        assert node["node_id"] == f"{row.layer}_{row.node.partition('F')[2]}_{row.position}" and node["layer"] == str(row.layer)
    assert len({node["node_id"] for node in written["nodes"]}) == len(written["nodes"])
    assert any(node["feature_type"] == "mlp reconstruction error" for node in written["nodes"])
    kept.to_graphml(tmp_path / "graph.graphml")
    networkx = kept.to_networkx()
    assert any(values.get("activation") for _, values in networkx.nodes(data=True))
    page = kept.show().to_html()
    assert "dictionaries=dictionaries" in page
    assert f'"{features["node"].iloc[0]}"' in page
    assert kept.paths(3)["share"].gt(0).all() and len(kept.bottlenecks(3))


def test_the_command_draws_features_of_folders(tmp_path) -> None:  # type: ignore[no-untyped-def]
    for layer, point_in in ((1, "blocks.1.ln2.hook_out"), (2, "blocks.2.hook_mlp_out")):  # a transcoder, an autoencoder
        save_dictionary(random_dictionary(point_in, f"blocks.{layer}.hook_mlp_out", d_in=64, seed=layer), tmp_path / str(layer))
    folders = [argument for layer in "12" for argument in ("--dictionary", str(tmp_path / layer))]
    asked = ["graph", "--prompt", PROMPT, "--answer", " Mary", "--wrong", " John", "--against", AGAINST, "--top", "200"]
    result = CliRunner().invoke(app, [*asked, *folders, "--out", str(tmp_path / "graph.json")])
    assert result.exit_code == 0, result.output
    graph = FlowGraph.from_json(tmp_path / "graph.json")
    assert {1, 2} <= set(graph.nodes["layer"][graph.nodes["component"] == "features"]) and any("F" in label for label in graph.labels)
    given = [one for layer in "12" for one in read_dictionaries(tmp_path / layer)]
    assert len(given) == 2
    target = logit_diff(" Mary", " John")
    expected = flow_graph(load_embedded(), PROMPT, target, reference=AGAINST, dictionaries=given).prune(top=200)
    assert graph == expected
    result = CliRunner().invoke(app, [*asked, "--dictionary", str(tmp_path / "3"), "--out", str(tmp_path / "graph.json")])
    assert result.exit_code == 2 and "does not exist" in result.output


def test_the_direct_path_is_complete() -> None:
    """Features, errors and tokens are what the target reads."""
    model, target = load_embedded(dtype=torch.float64), logit_diff(" Mary", " John")
    given = [random_dictionary(f"blocks.{i}.ln2.hook_out", f"blocks.{i}.hook_mlp_out", d_in=64, seed=100 * i) for i in range(4)]
    cache = propagate(model, PROMPT, target, reference=AGAINST, dictionaries=given, dictionary_path="direct", audit=True)
    points = [one.point_out[0] for one in given]
    parts = [cache.features(p).to_dense().sum() + cache.error(p).sum() for p in points]
    assert cache.reference_value is not None
    whole = float(cache.value - cache.reference_value)
    assert float(sum(parts) + cache.tokens().sum()) == pytest.approx(whole, rel=1e-5)  # type: ignore[arg-type]
    account = cache.conservation()
    assert float((account["unexplained"] / account["value"]).abs().max()) < 1e-5
    assert account["features"].abs().max() > 1e-3


def test_bad_input() -> None:
    model = build_gpt2(dtype=torch.float64, n_layers=3)
    one = random_dictionary("blocks.1.hook_resid_pre", d_in=model.cfg.d_model)
    other = random_dictionary("blocks.1.hook_mlp_out", d_in=model.cfg.d_model)
    with pytest.raises(RelevanceError, match="two dictionaries write in layer 1"):
        flow_graph(model, TOKENS, TARGET, reference=OTHER, dictionaries=[one, other])
    with pytest.raises(CoverageError, match="cannot tell the edges"):
        flow_graph(
            model,
            TOKENS,
            TARGET,
            reference=OTHER,
            dictionaries=[replace(one, point_in="blocks.1.attn.hook_z", point_out=("blocks.1.attn.hook_z",))],
        )
    with pytest.raises(RelevanceError, match="n_features"):
        flow_graph(model, TOKENS, TARGET, reference=OTHER, dictionaries=[one], n_features=-1)
    with pytest.raises(RelevanceError, match="no edge carries"):
        flow_graph(model, TOKENS, TARGET, reference=TOKENS, dictionaries=[one])
