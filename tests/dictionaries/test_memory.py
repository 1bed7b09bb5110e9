"""No tensor over all features of a dictionary stays: as many are there at one time with one dictionary as with one in each layer."""

from __future__ import annotations

import pytest
import torch

from analyses.benchmarks.features import DenseFeatures
from lens_relevance import propagate
from tests.dictionaries.random_dictionaries import N, random_dictionary
from tests.engine.families import TARGET, inputs_and_reference
from tests.models import build_gpt2


@pytest.mark.parametrize("path", ["features", "model"])
def test_dense_features_are_those_of_one_layer(path: str) -> None:
    model, (tokens, other) = build_gpt2(dtype=torch.float64, n_layers=4), inputs_and_reference()
    given = [
        random_dictionary(f"blocks.{i}.ln2.hook_out", f"blocks.{i}.hook_mlp_out", d_in=model.cfg.d_model, kind="topk") for i in range(4)
    ]
    most = []
    for some in (given[1:2], given):
        propagate(model, tokens, TARGET, reference=other, dictionaries=some, dictionary_path=path)
        with DenseFeatures(tokens.numel(), N) as dense:
            cache = propagate(model, tokens, TARGET, reference=other, dictionaries=some, dictionary_path=path)
        assert float(cache.features(some[0].point_out[0]).to_dense().abs().max()) > 0
        assert dense.alive == 0
        most.append(dense.most)
    assert most[0] == most[1] > 2
