"""A graph over features: what enters a node adds up to its relevance, and what leaves it, to all others, does too."""

from __future__ import annotations

import pytest
import torch

from analyses.dictionaries import feature_graph
from analyses.embedded import load_embedded
from lens_relevance import Dictionary, RelevanceError, logit_diff, propagate
from lens_relevance.dictionaries import ReLU

PROMPT = "When Mary and John went to the store, John gave a drink to"
AGAINST = "When Mary and John went to the store, Mary gave a drink to"


def dictionaries() -> list[Dictionary]:
    """Random transcoders of all four layers, in fp64."""
    made = []
    for layer in range(4):
        generator = torch.Generator().manual_seed(layer)
        encoder, decoder = (0.3 * torch.randn(8, 64, generator=generator, dtype=torch.float64) for _ in range(2))
        zeros = torch.zeros(8, dtype=torch.float64)
        made.append(
            Dictionary(
                encoder,
                zeros,
                (decoder,),
                torch.zeros(64, dtype=torch.float64),
                ReLU(),
                f"blocks.{layer}.ln2.hook_out",
                (f"blocks.{layer}.hook_mlp_out",),
            )
        )
    return made


def test_edges_add_up() -> None:
    model, target = load_embedded(dtype=torch.float64), logit_diff(" Mary", " John")
    given = dictionaries()
    graph = feature_graph(model, PROMPT, target, dictionaries=given, reference=AGAINST, n_nodes=400, n_edges=10**6)
    entering = graph.edges.groupby("target")["score"].sum()
    assert float(entering["logits"]) == pytest.approx(graph.value, rel=1e-5)
    relevance = graph.nodes.set_index("node")["relevance"]
    assert len(relevance) > 50 and float(relevance.abs().max()) > 1e-2
    for node, score in relevance.items():
        assert float(entering[node]) == pytest.approx(float(score), rel=1e-4, abs=1e-6)
    leaving = graph.edges.groupby("source")["score"].sum()
    for node, score in relevance.items():  # every feature of every layer is in the graph, so that all it gives is there
        assert float(leaving[node]) == pytest.approx(float(score), rel=1e-4, abs=1e-6)
    tokens = propagate(model, PROMPT, target, reference=AGAINST, dictionaries=given).tokens()[0]
    for position in tokens.nonzero().flatten().tolist():
        assert float(leaving[f"token@{position}"]) == pytest.approx(float(tokens[position]), rel=1e-4, abs=1e-6)
    assert any(name.startswith("error L") for name in leaving.index)
    assert any(name.endswith(".q") for name in graph.carriers["carrier"])


def test_the_direct_path_is_complete() -> None:
    """Features, errors and tokens are what the target reads."""
    model, target = load_embedded(dtype=torch.float64), logit_diff(" Mary", " John")
    given = dictionaries()
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
    model = load_embedded()
    with pytest.raises(RelevanceError, match="one prompt"):
        feature_graph(model, [PROMPT, PROMPT], dictionaries=dictionaries(), reference=[AGAINST, AGAINST])
    with pytest.raises(RelevanceError, match="one dictionary at least"):
        feature_graph(model, PROMPT, dictionaries=[], reference=AGAINST)
    with pytest.raises(RelevanceError, match="no feature has any relevance"):
        feature_graph(model, PROMPT, logit_diff(" Mary", " John"), dictionaries=dictionaries(), reference=PROMPT)
