"""Attention flow against brute force on small graphs, and its cost on a large one."""

from __future__ import annotations

import itertools

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.sparse import csr_array

from lens_relevance import logit
from lens_relevance.attention_methods import token_relevance
from lens_relevance.attention_methods.attention_flow import Flow, flows_from, max_flow


def smallest_cut(capacities: np.ndarray, token: int, source: int) -> float:
    """The max-flow as the smallest of all cuts, every set of nodes tried."""
    n_layers, n = capacities.shape[:2]
    nodes = list(itertools.product(range(n_layers + 1), range(n)))
    top, bottom = (n_layers, token), (0, source)
    free = [node for node in nodes if node not in (top, bottom)]
    best = np.inf
    for chosen in itertools.product([False, True], repeat=len(free)):
        inside = {node for node, is_in in zip(free, chosen, strict=True) if is_in} | {top}
        cut = sum(
            capacities[layer, upper, lower]
            for layer in range(n_layers)
            for upper in range(n)
            for lower in range(n)
            if (layer + 1, upper) in inside and (layer, lower) not in inside
        )
        best = min(best, cut)
    return best


def random_causal(rng: np.random.Generator, layers: int, tokens: int, sharpness: float = 1.0) -> np.ndarray:
    """Causal patterns with the residual, rows summing to 1."""
    scores = rng.normal(size=(layers, tokens, tokens)) * sharpness
    weights = np.exp(scores) * np.tril(np.ones((tokens, tokens)))
    return (weights / weights.sum(-1, keepdims=True) + np.eye(tokens)) / 2


@pytest.mark.parametrize("seed", range(3))
def test_equals_brute_force_over_all_cuts(seed):
    capacities = random_causal(np.random.default_rng(seed), 3, 3, sharpness=2.0)
    for token in range(3):
        found = flows_from(capacities, token)
        expected = [smallest_cut(capacities, token, source) for source in range(3)]
        np.testing.assert_allclose(found, expected, atol=1e-8)
    assert found.min() < 0.9  # somewhere the flow is limited by more than the top row, which could send 1


def test_equals_networkx_and_a_linear_program():
    capacities = random_causal(np.random.default_rng(7), 4, 12, sharpness=3.0)
    graph = nx.DiGraph()
    for layer, upper, lower in itertools.product(range(4), range(12), range(12)):
        if capacities[layer, upper, lower] > 0:
            graph.add_edge((layer + 1, upper), (layer, lower), capacity=capacities[layer, upper, lower])
    found = flows_from(capacities, 11)
    for source in range(12):
        np.testing.assert_allclose(found[source], nx.maximum_flow_value(graph, (4, 11), (0, source)), atol=1e-8)
    edges, nodes = list(graph.edges), list(graph.nodes)
    inner = [node for node in nodes if node not in ((4, 11), (0, 5))]
    balance = np.array([[(edge[0] == node) * 1.0 - (edge[1] == node) * 1.0 for edge in edges] for node in inner])
    gain = np.array([-1.0 if edge[1] == (0, 5) else 0.0 for edge in edges])
    solved = linprog(gain, A_eq=balance, b_eq=np.zeros(len(inner)), bounds=[(0, graph.edges[e]["capacity"]) for e in edges])
    np.testing.assert_allclose(found[5], -solved.fun, atol=1e-8)


def test_capacities_far_below_a_unit_still_count():
    """A single rounding to whole units of 2^-29 would lose these edges."""
    tiny = np.full(50, 3e-10)
    rows, columns = np.r_[np.zeros(50, int), np.arange(1, 51), 0], np.r_[np.arange(1, 51), np.full(50, 51), 52]
    graph = csr_array((np.r_[tiny, tiny, 1.0], (rows, columns)), shape=(53, 53))
    assert abs(max_flow(graph, 0, 51) - 50 * 3e-10) < 1e-9


def test_all_sources_of_a_large_model():
    """12 layers x 12 heads x 64 tokens, all 64 sources: exact against networkx on some."""
    scores = torch.randn(1, 12, 12, 64, 64, generator=torch.Generator().manual_seed(0)).double() * 2
    patterns = scores.masked_fill(~torch.ones(64, 64).tril().bool(), float("-inf")).softmax(-1).mean(2)
    capacities = (patterns + torch.eye(64)) / 2
    start = torch.zeros(1, 64, dtype=torch.float64)
    start[0, -1] = 1
    found = Flow(capacities, start, torch.ones(1, 64).bool()).scores()[0]
    graph = nx.DiGraph()
    for layer, upper, lower in capacities[0].nonzero().tolist():
        graph.add_edge((layer + 1, upper), (layer, lower), capacity=float(capacities[0, layer, upper, lower]))
    for source in (0, 40, 63):
        assert abs(float(found[source]) - nx.maximum_flow_value(graph, (12, 63), (0, source))) < 1e-6


def test_flow_of_a_model_is_that_of_its_rollout_graph(gpt2, tokens):
    flow = token_relevance(gpt2, tokens, logit(7), method="attention_flow")
    rollout = token_relevance(gpt2, tokens, logit(7), method="rollout")
    torch.testing.assert_close(flow.layers, rollout.layers)
    torch.testing.assert_close(flow.scores, flow.matrix[:, -1])
    assert (flow.scores >= rollout.scores - 1e-6).all()  # rollout's row is one feasible flow for each source
