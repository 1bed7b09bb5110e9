"""The flow view without a browser: what is drawn, in which order the slider shows it, and where it stands."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analyses import views
from analyses.graph import FlowGraph
from analyses.views.flow_layout import BOTTOM, GUTTER, RADIUS, SMALLEST_RADIUS, TOP, place
from analyses.views.flow_marks import Flow, flow_of, parse_component
from analyses.views.flow_static import drawn_marks
from analyses.views.flow_strength import path_strengths
from lens_relevance import RelevanceError
from tests.analyses.test_views import TOKENS, props_of

NODES = pd.DataFrame(
    {
        "node": ["embed", "L0H1", "L0H1.q", "L0.mlp", "L2H0", "logits"],
        "position": [0, 1, 1, 1, 2, 2],
        "score": [0.25, 1.0, 0.5, -0.25, -4.0, 100.0],
    }
)
EDGES = pd.DataFrame(
    {
        "source": ["embed", "L0H1", "pos_embed", "L2H0"],
        "target": ["L0H1.v", "L0.mlp.in", "L2H0.k", "logits"],
        "position": [1, 1, 2, 2],
        "source_position": [0, 1, 0, np.nan],
        "score": [0.5, -0.1, 0.2, -0.9],
    }
)
GEMMA = Path(__file__).parent / "data" / "gemma_flow_graph.json"  # one prompt on Gemma 3 270M: 18 layers, 15 tokens


def flow_of_gemma() -> Flow:
    view = FlowGraph.from_json(GEMMA).show()
    return view.flow  # type: ignore[no-any-return]


def test_readers_belong_to_their_component() -> None:
    flow = flow_of(NODES, EDGES, TOKENS[:3], max_edges=10)
    marks = {(mark.name, mark.position): mark for mark in flow.marks}
    assert set(marks) == {("embed", 0), ("L0H1", 1), ("L0.mlp", 1), ("L2H0", 2), ("logits", 2), ("pos_embed", 0)}
    assert marks["L0H1", 1].readers == {"q": 0.5} and marks["pos_embed", 0].score is None
    # pos_embed -> L2H0 -> logits is the one path; what leads nowhere comes last, by |score|
    assert [(flow.marks[link.source].name, flow.marks[link.target].name, link.reader, link.strength) for link in flow.links] == [
        ("L2H0", "logits", "", 0.2),
        ("pos_embed", "L2H0", "k", 0.2),
        ("embed", "L0H1", "v", 0.0),
        ("L0H1", "L0.mlp", "in", 0.0),
    ]
    assert [flow.shown(n) for n in range(1, 5)] == [2, 2, 3, 4]


def brute_force(ends: list[tuple[tuple[str, int], tuple[str, int]]], scores: list[float]) -> list[float]:
    """Every path of a small graph, one by one."""
    graph = nx.DiGraph()
    for pair, score in zip(ends, scores, strict=True):
        graph.add_edge(*pair, size=abs(score))
    best = dict.fromkeys(ends, 0.0)
    for start in [n for n in graph if n[0] == "embed"]:
        for end in [n for n in graph if n[0] == "logits"]:
            for path in nx.all_simple_edge_paths(graph, start, end):
                weakest = min(graph.edges[pair]["size"] for pair in path)
                for pair in path:
                    best[pair] = max(best[pair], weakest)  # type: ignore[index]
    return [best[pair] for pair in ends]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_strength_of_an_edge_is_the_weakest_edge_of_its_best_path(data: st.DataObject) -> None:
    names = ["embed", "L0H0", "L0.mlp", "L1H0", "L1H1", "L1.mlp", "logits"]
    pairs = [((a, 0), (b, 0)) for i, a in enumerate(names) for b in names[i + 1 :]]
    ends = data.draw(st.lists(st.sampled_from(pairs), unique=True, min_size=1, max_size=14))
    scores = data.draw(st.lists(st.integers(-9, 9).filter(bool).map(float), min_size=len(ends), max_size=len(ends)))
    assert path_strengths(ends, scores, inputs=[("embed", 0)], targets=[("logits", 0)]) == brute_force(ends, scores)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 50, 100, 200])
def test_every_edge_that_the_slider_shows_lies_on_a_path_from_a_token_to_the_answer(n: int) -> None:
    flow = flow_of_gemma()
    shown = flow.links[: flow.shown(n)]
    graph = nx.DiGraph([(link.source, link.target) for link in shown])
    start, end = ({i for i in graph if flow.marks[i].kind == kind} for kind in ("embed", "logits"))
    reached = set().union(*(nx.descendants(graph, i) | {i} for i in start))
    reaching = set().union(*(nx.ancestors(graph, i) | {i} for i in end))
    assert len(shown) >= n and set(graph) == reached & reaching
    assert len(shown) < n + 12  # at most one path more than was asked for


def test_the_listed_paths_are_drawn_first_however_thin() -> None:
    """The share of a path counts what each node passes on, so that a listed path may have a thinner edge than many that are not listed."""
    edges = pd.DataFrame(
        [
            ("embed", "L0.mlp.in", 1, 0.01),
            ("L0.mlp", "logits", 1, 5.0),
            ("embed", "L1.mlp.in", 1, 2.0),
            ("L1.mlp", "logits", 1, 1.0),
            ("embed", "L2.mlp.in", 1, 0.5),
            ("L2.mlp", "logits", 1, 0.25),
        ],
        columns=["source", "target", "position", "score"],
    )
    listed = "embed@1 -> L0.mlp.in@1 -> L0.mlp@1 -> logits@1", "embed@1 -> L2.mlp.in@1 -> L2.mlp@1 -> logits@1"
    paths = pd.DataFrame({"path": listed, "share": [0.8, 0.04], "weakest": [0.01, 0.25]})
    flow = flow_of(NODES.head(0), edges, TOKENS[:2], max_edges=10, paths=paths)
    assert [link.score for link in flow.links] == [0.01, 5.0, 0.5, 0.25, 2.0, 1.0]
    assert [path.links for path in flow.paths] == [(0, 1), (2, 3)] and flow.whole == [2, 4, 6]
    assert [flow.shown(n) for n in (0, 1, 2, 3, 5, 9)] == [2, 2, 2, 4, 6, 6]
    few = flow_of(NODES.head(0), edges, TOKENS[:2], max_edges=3, paths=paths)
    assert [path.links for path in few.paths] == [(0, 1)] and few.dropped == 3 and [few.shown(n) for n in (1, 3)] == [2, 3]


def test_rows_rise_with_the_layers_and_tokens_run_to_the_right() -> None:
    flow = flow_of(NODES, EDGES, TOKENS[:3], max_edges=10)
    placed = place(flow.marks, range(len(flow.marks)), TOKENS[:3], width=900, height=500)
    marks = {flow.marks[i].name: placed.marks[i] for i in placed.marks}
    heights = [marks[name][1] for name in ("embed", "L0H1", "L0.mlp", "L2H0", "logits")]
    assert heights == sorted(heights, reverse=True)  # y grows downwards
    assert [row.name for row in placed.rows] == ["embed", "L0 heads", "L0 mlp", "L2 heads", "logits"]  # no row for layer 1, or L2's MLP
    assert marks["embed"][0] < marks["pos_embed"][0] < marks["L0H1"][0] < marks["L2H0"][0] == marks["logits"][0]
    # Areas above the smallest mark go with |score|; the logits set no scale.
    radii = {name: r - SMALLEST_RADIUS for name, (_, _, r) in marks.items()}
    assert radii["L2H0"] == pytest.approx(RADIUS - SMALLEST_RADIUS) == radii["logits"]
    assert radii["L0H1"] == pytest.approx(radii["L2H0"] / 2) and radii["embed"] == pytest.approx(radii["L2H0"] / 4)


@pytest.mark.parametrize(("width", "height"), [(880, 560), (360, 500), (1600, 1000), (300, 400)])
def test_the_picture_of_an_eighteen_layer_model_fits(width: int, height: int) -> None:
    flow = flow_of_gemma()
    for n in (1, 10, 100, len(flow.links)):
        drawn = drawn_marks(flow, flow.shown(n))
        placed = place(flow.marks, drawn, flow.tokens, width=width, height=height)
        assert sorted(placed.marks) == drawn
        for x, y, r in placed.marks.values():
            assert GUTTER - 8 <= x - r and x + r <= width and TOP - 4 <= y - 1.2 * r and y + 1.2 * r <= height - BOTTOM + 4
        columns = placed.columns
        assert sum(column.count for column in columns) == len(flow.tokens)
        assert [c.position for c in columns] == np.cumsum([0, *(c.count for c in columns[:-1])]).tolist()
        assert columns[-1].centre + columns[-1].width / 2 <= width


def test_marks_of_a_crowded_cell_do_not_overlap_and_stay_in_their_column() -> None:
    nodes = pd.DataFrame([{"node": f"L0H{head}", "position": position, "score": 1.0} for head in range(12) for position in (0, 1)])
    flow = flow_of(nodes, EDGES.head(0), TOKENS[:2], max_edges=10)
    placed = place(flow.marks, range(len(flow.marks)), TOKENS[:2], width=900, height=300)
    for i, first in placed.marks.items():
        for j, second in placed.marks.items():
            assert i == j or np.hypot(first[0] - second[0], first[1] - second[1]) >= first[2] + second[2]
    border = placed.columns[0].centre + placed.columns[0].width / 2
    assert all((placed.marks[i][0] < border) == (flow.marks[i].position == 0) for i in placed.marks)


def test_layers_share_a_row_where_there_are_too_many() -> None:
    nodes = pd.DataFrame([{"node": f"L{layer}H0", "position": 0, "score": 1.0} for layer in range(80)])
    flow = flow_of(nodes, EDGES.head(0), TOKENS[:1], max_edges=1)
    placed = place(flow.marks, range(80), TOKENS[:1], width=900, height=500)
    assert placed.rows[0].name == "L0–1 heads" and len(placed.rows) == 40
    places = sorted(placed.marks[i][:2] for i in placed.marks)
    assert len(set(places)) == 80  # nothing hides anything


def test_the_strongest_edges_stay() -> None:
    flow = flow_of(NODES, EDGES, TOKENS[:3], max_edges=2)
    assert [link.score for link in flow.links] == [-0.9, 0.2] and flow.dropped == 2


def test_names_of_another_form_say_what_they_are() -> None:
    nodes = pd.DataFrame({"node": ["blocks.3.experts"], "position": [0], "score": [1.0], "kind": ["mlp"], "layer": [3]})
    edges = pd.DataFrame({"source": ["embed"], "target": ["blocks.3.experts"], "position": [0], "score": [1.0]})
    mark = flow_of(nodes, edges, TOKENS[:1], max_edges=5).marks[0]
    assert (mark.name, mark.kind, mark.layer) == ("blocks.3.experts", "mlp", 3)


def test_listed_paths_are_those_of_the_graph() -> None:
    graph = FlowGraph.from_json(GEMMA)
    flow, table = flow_of_gemma(), graph.paths(10)
    assert len(flow.paths) == 10
    for path, row in zip(flow.paths, table.itertuples(), strict=True):
        assert (path.share, path.weakest) == (row.share, row.weakest)
        named = [part for part in str(row.path).split(" -> ") if not part.split("@")[0].endswith((".q", ".k", ".v", ".in"))]
        assert {f"{flow.marks[i].name}@{flow.marks[i].position}" for i in path.marks} >= set(named)
        for link, source, target in zip(path.links, path.marks[:-1], path.marks[1:], strict=True):
            assert (flow.links[link].source, flow.links[link].target) == (source, target)


def test_the_page_and_the_static_picture_say_what_they_show() -> None:
    view = FlowGraph.from_json(GEMMA).show()
    assert props_of(view)["info"]["model"] == "gemma-3-270m" and props_of(view)["info"]["ruleset"] == "deeplift"
    assert any("gemma-3-270m" in text.get_text() for text in view.figure().axes[0].texts)
    assert b"gemma-3-270m" in view.svg() or b"metadata" in view.svg()


def test_the_share_is_of_the_logits_unless_a_value_is_given() -> None:
    assert props_of(views.flow_view(NODES, EDGES, TOKENS[:3]))["targetValue"] == 100.0
    assert props_of(views.flow_view(NODES, EDGES, TOKENS[:3], target_value=2.0))["targetValue"] == 2.0
    assert props_of(views.flow_view(NODES.iloc[:-1], EDGES, TOKENS[:3]))["targetValue"] is None


def test_a_flow_without_edges_is_drawn() -> None:
    view = views.flow_view(NODES, EDGES.head(0), TOKENS[:3])
    assert view.png() and props_of(view)["edges"] == []


@pytest.mark.parametrize("name", ["L3", "H5", "l3h5", "L3H5.z", "L3.mlp.out", "blocks.0.attn", ""])
def test_names_that_are_no_component(name: str) -> None:
    with pytest.raises(RelevanceError, match="no component of a flow graph"):
        parse_component(name)


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (NODES.drop(columns="score"), EDGES, "nodes has no column 'score'"),
        (NODES, EDGES.drop(columns="target"), "edges has no column 'target'"),
        (pd.concat([NODES, NODES.iloc[[1]]]), EDGES, "'L0H1' at position 1 twice"),
        (NODES.assign(position=7), EDGES, "is at position 7, but the 3 tokens"),
        (NODES.assign(score=np.nan), EDGES, "score of node 'embed' is nan"),
        (NODES, EDGES.assign(score=np.inf), "score of edge embed -> L0H1.v is inf"),
        (NODES, EDGES.assign(source_position=9), "is at position 9"),
        (NODES, EDGES.assign(source="head 3"), "'head 3' is no component"),
    ],
)
def test_bad_graphs_are_named(nodes: pd.DataFrame, edges: pd.DataFrame, message: str) -> None:
    with pytest.raises(RelevanceError, match=message):
        views.flow_view(nodes, edges, TOKENS[:3])


def test_the_static_flow_draws_its_edges_and_nodes() -> None:
    axis = views.flow_view(NODES, EDGES, TOKENS[:3]).figure().axes[0]
    curves = axis.collections[0]
    assert len(curves.get_paths()) == len(EDGES)
    assert sum(len(collection.get_offsets()) for collection in axis.collections[1:]) == 6
