"""MIB's circuits: names and counts as in the published example, scores that survive, areas equal to MIB's formula written again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import (
    MIB_SHARES,
    Ablation,
    ItemScores,
    MibGraph,
    MibModel,
    from_mib,
    mib_areas,
    mib_curve,
    read_mib,
    score_items,
    to_mib,
    top,
    write_mib,
    write_mib_circuits,
)
from analyses.circuits.faithfulness import faithfulness
from analyses.tasks.pairs import PromptPairs
from lens_relevance import RelevanceError, logit_diff
from tests import models

PAIRS = PromptPairs(models.random_tokens(2), models.random_tokens(2, seed=1), logit_diff(3, 4))
GPT2_SMALL = MibModel(12, 12, False, 768)


def random_graph(model: MibModel, seed: int = 0) -> MibGraph:
    chance = np.random.default_rng(seed)
    edges, nodes = len(model.edges()), len(model.nodes())
    return MibGraph(
        model, chance.standard_normal(edges), chance.random(edges) < 0.5, chance.standard_normal(nodes), chance.random(nodes) < 0.5
    )


def equal(a: MibGraph, b: MibGraph) -> bool:
    arrays = ("edge_scores", "edges_kept", "node_scores", "nodes_kept")
    return a.model == b.model and all(np.array_equal(getattr(a, n), getattr(b, n), equal_nan=n.endswith("scores")) for n in arrays)


@pytest.fixture(scope="module", params=["llama", "neox"])
def model(request: pytest.FixtureRequest) -> TransformerBridge:
    """Grouped-query attention; attention and MLP side by side."""
    return {"llama": models.build_llama, "neox": models.build_neox}[request.param]()


def test_a_gpt2_small_graph_has_the_nodes_and_edges_of_the_published_example() -> None:
    assert len(GPT2_SMALL.nodes()) == 158 and len(GPT2_SMALL.edges()) == len(set(GPT2_SMALL.edges())) == 32_491
    one = MibModel(1, 2, False, 8)
    assert one.nodes() == ["input", "a0.h0", "a0.h1", "m0", "logits"]
    heads = {f"input->a0.h{h}<{letter}>" for h in (0, 1) for letter in "qkv"}
    rest = {"input->m0", "a0.h0->m0", "a0.h1->m0", "input->logits", "a0.h0->logits", "a0.h1->logits", "m0->logits"}
    assert set(one.edges()) == heads | rest
    assert set(replace(one, parallel_attn_mlp=True).edges()) == heads | rest - {"a0.h0->m0", "a0.h1->m0"}


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
def test_a_file_gives_back_every_bit(tmp_path: Path, ending: str) -> None:
    graph = random_graph(GPT2_SMALL)
    graph.node_scores[3] = math.nan
    write_mib(graph, tmp_path / f"circuit{ending}")
    assert equal(read_mib(tmp_path / f"circuit{ending}"), graph)


def test_the_json_is_what_mib_reads(tmp_path: Path) -> None:
    """Its reader wants cfg, nodes and edges, `in_graph` everywhere, a score at every edge, and none at nodes of a graph of edges."""
    graph = replace(random_graph(MibModel(2, 2, False, 8)), node_scores=np.full(8, math.nan))
    write_mib(graph, tmp_path / "importances.json")
    content = json.loads((tmp_path / "importances.json").read_text())
    assert list(content) == ["cfg", "nodes", "edges"]
    assert content["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert content["nodes"]["a1.h0"] == {"in_graph": bool(graph.nodes_kept[graph.model.nodes().index("a1.h0")])}
    at = graph.model.edges().index("m0->a1.h1<v>")
    assert content["edges"]["m0->a1.h1<v>"] == {"score": graph.edge_scores[at], "in_graph": bool(graph.edges_kept[at])}


@pytest.mark.parametrize("level", ["edge", "node"])
def test_scores_and_circuits_of_a_model_there_and_back(model: TransformerBridge, level: Any, tmp_path: Path) -> None:
    ablation = Ablation(model, PAIRS, level)
    scores = score_items(ablation, "deeplift")
    circuit = top(scores, len(scores.items) // 3)
    graph = to_mib(model, scores, circuit)
    write_mib(graph, tmp_path / "importances.json")
    back = from_mib(read_mib(tmp_path / "importances.json"), model, ablation.items)
    sign = -1 if scores.downwards else 1
    assert np.array_equal(back.signed, sign * scores.signed) and np.abs(back.signed).max() > 0
    if level == "edge":
        source, target, score = scores.to_frame().iloc[0][["source", "target", "score"]]
        layer, head = target.split("H")[0][1:], target.split("H")[-1].split(".")[0]
        mib_target = {"q": f"a{layer}.h{head}<q>", "k": f"a{layer}.h{head}<k>", "v": f"a{layer}.h{head}<v>"}.get(target[-1]) or (
            "logits" if target == "logits" else f"m{target[1:].split('.')[0]}"
        )
        mib_source = "input" if source == "embed" else f"m{source[1:-4]}" if source.endswith("mlp") else f"a{source[1:].replace('H', '.h')}"
        at = graph.model.edges().index(f"{mib_source}->{mib_target}")
        assert graph.edge_scores[at] == sign * score and graph.edges_kept.sum() == len(circuit)
    else:
        at = graph.model.nodes().index("a1.h1")
        assert graph.node_scores[at] == sign * scores.signed[list(scores.items.frame["node"]).index("L1H1")]
        assert np.isnan(graph.node_scores[-1]) and graph.nodes_kept.sum() == len(circuit) + 1


def test_signs_where_the_metric_falls_towards_the_full_model(model: TransformerBridge) -> None:
    items = Ablation(model, PAIRS, "node").items
    values = np.arange(1.0, len(items) + 1)
    up, down = (to_mib(model, ItemScores(items, "mine", values, values, downwards)) for downwards in (False, True))
    assert np.array_equal(up.node_scores[:-1], -down.node_scores[:-1]) and up.node_scores[0] == 1.0


def reference_areas(f: list[float]) -> tuple[float, float]:
    """MIB's evaluation, from its description: between each two of ten shares, width times the mean of f, and of |1 - f|."""
    shares = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]
    cpr = cmd = 0.0
    for i in range(9):
        width = shares[i + 1] - shares[i]
        cpr += width * (f[i] + f[i + 1]) / 2
        cmd += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    return cpr, cmd


@given(st.lists(st.floats(-3, 3), min_size=10, max_size=10))
def test_areas_by_mibs_formula(f: list[float]) -> None:
    assert mib_areas(f) == pytest.approx(reference_areas(f), abs=1e-9)


def test_a_curve_at_mibs_sizes_equals_its_circuits_one_by_one(model: TransformerBridge) -> None:
    ablation = Ablation(model, PAIRS, "edge")
    scores = score_items(ablation, "gradient")
    n = len(scores.items)
    curve = mib_curve(ablation, scores)
    assert curve.frame["k"].tolist() == [math.floor(share * n) for share in MIB_SHARES]
    alone = [float(faithfulness(ablation, [top(scores, k, "signed")])[0]) if k else 0.0 for k in curve.frame["k"]]
    np.testing.assert_allclose(curve.frame["faithfulness"], alone, atol=1e-5)
    assert (curve.cpr, curve.cmd) == pytest.approx(reference_areas(curve.frame["faithfulness"].tolist()), abs=1e-9)
    assert abs(curve.frame["faithfulness"].iloc[-3]) > 1e-3


def test_nine_circuits_of_the_shares_that_a_submission_holds(model: TransformerBridge, tmp_path: Path) -> None:
    scores = score_items(Ablation(model, PAIRS, "edge"), "gradient")
    paths = write_mib_circuits(model, scores, tmp_path)
    assert [path.stem for path in paths] == ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5"]
    for path, share in zip(paths, MIB_SHARES, strict=False):
        graph = read_mib(path)
        assert graph.edges_kept.sum() == int(share * len(scores.items)) and np.isnan(graph.edge_scores).all()
    best = top(scores, int(0.5 * len(scores.items)), "signed")
    assert np.array_equal(graph.edges_kept, to_mib(model, scores, best).edges_kept)


def test_a_graph_of_another_model_or_without_scores_is_refused(model: TransformerBridge) -> None:
    items = Ablation(model, PAIRS, "edge").items
    with pytest.raises(RelevanceError, match="one of another model"):
        from_mib(random_graph(GPT2_SMALL), model, items)
    scores = score_items(Ablation(model, PAIRS, "node"), "gradient")
    with pytest.raises(RelevanceError, match="no score for .*->.*scores of edges are needed"):
        from_mib(to_mib(model, scores), model, items)
    with pytest.raises(RelevanceError, match="at all positions together"):
        to_mib(model, score_items(Ablation(model, PAIRS, "edge", by_position=True), "gradient"))


def damaged(content: dict[str, Any], how: str) -> str:
    first = next(iter(content["edges"]))
    changes: dict[str, Any] = {
        "not JSON": lambda: "{",
        "a list": lambda: "[]",
        "too deep": lambda: "[" * 100_000,
        "no edges": lambda: content.pop("edges"),
        "unknown part": lambda: content.update(extra=1),
        "unknown cfg": lambda: content["cfg"].update(seed=1),
        "layers as text": lambda: content["cfg"].update(n_layers="2"),
        "no heads": lambda: content["cfg"].update(n_heads=0),
        "endless layers": lambda: content["cfg"].update(n_layers=90_000, n_heads=90_000),
        "missing edge": lambda: content["edges"].pop(first),
        "foreign edge": lambda: content["edges"].update({"<b>\x1b[31m": {"score": 1.0, "in_graph": True}}),
        "a score in words": lambda: content["edges"][first].update(score="much"),
        "an infinite score": lambda: content["edges"][first].update(score=math.inf),
        "membership as a number": lambda: content["edges"][first].update(in_graph=1),
        "an unknown field of an edge": lambda: content["edges"][first].update(weight=1),
        "neurons": lambda: content["nodes"]["m0"].update(neurons=[True], neurons_scores=[1.0]),
        "twice": lambda: json.dumps(content).replace('"nodes"', '"cfg": {}, "nodes"', 1),
    }
    done = changes[how]()
    return done if isinstance(done, str) else json.dumps(content)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("not JSON", "cannot be read as a MIB circuit"),
        ("a list", "not an object"),
        ("too deep", "nested too deeply"),
        ("no edges", "lacks 'edges'"),
        ("unknown part", "unknown field 'extra'"),
        ("unknown cfg", "unknown field 'seed'"),
        ("layers as text", "n_layers is '2', not a count"),
        ("no heads", "n_heads is '0', not a count"),
        ("endless layers", "too many edges"),
        ("missing edge", "edges lacks"),
        ("foreign edge", r"unknown field '<b>\\+x1b"),
        ("a score in words", "the score 'much', not a number"),
        ("an infinite score", "the score 'inf', not a number"),
        ("membership as a number", "in_graph: '1', not true or false"),
        ("an unknown field of an edge", "unknown field 'weight'"),
        ("neurons", "m0 has scores of neurons"),
        ("twice", "'cfg' occurs twice"),
    ],
)
def test_damaged_and_foreign_files(tmp_path: Path, how: str, said: str) -> None:
    path = tmp_path / "circuit.json"
    write_mib(random_graph(MibModel(2, 2, False, 8)), path)
    path.write_text(damaged(json.loads(path.read_text()), how))
    with pytest.raises(RelevanceError, match=said):
        read_mib(path)


def test_other_kinds_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RelevanceError, match="a pickle, which can run code"):
        read_mib(tmp_path / "graph.pt")
    with pytest.raises(RelevanceError, match="cannot be read as a MIB circuit"):
        read_mib(tmp_path / "missing.json")
    for name in ("a.pt", "a"):
        with pytest.raises(RelevanceError, match="written as .json or .safetensors"):
            write_mib(random_graph(MibModel(1, 1, False, 8)), tmp_path / name)
    whole = tmp_path / "a.safetensors"
    write_mib(random_graph(MibModel(1, 1, False, 8)), whole)
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(RelevanceError, match="cannot be read as a MIB circuit"):
        read_mib(whole)
    monkeypatch.setattr("lens_relevance.json_files.LARGEST", 10)
    (tmp_path / "large.json").write_text("{}" * 20)
    with pytest.raises(RelevanceError, match="more than the 10 that are read"):
        read_mib(tmp_path / "large.json")
    with pytest.raises(RelevanceError, match="this has 13 edges, but there are 2 values"):
        MibGraph(MibModel(1, 2, False, 8), np.zeros(2), np.zeros(2, bool), np.zeros(5), np.zeros(5, bool))
