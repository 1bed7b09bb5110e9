"""Training, saving, ranking and ablating features on the embedded model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.dictionaries import (
    ablate_features,
    compare_features,
    label_features,
    measure_quality,
    rank_features,
    save_dictionary,
    train_dictionary,
)
from analyses.dictionaries.activations import activations, token_rows
from analyses.dictionaries.train import Trained
from analyses.embedded import load_embedded
from analyses.embedded.corpus import ioi_sequences
from analyses.evaluation.comparison import compare_with_patching
from analyses.tasks import PromptPairs, ioi
from lens_relevance import Dictionary, RelevanceError, propagate, read_dictionaries, read_dictionary
from lens_relevance.dictionaries import ReLU, TopK
from tests.dictionaries.random_dictionaries import random_dictionary

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return load_embedded()


@pytest.fixture(scope="module")
def rows(model: TransformerBridge) -> torch.Tensor:
    sequences = ioi_sequences(model, 20, 0)
    width = min(s.shape[1] for s in sequences)
    return torch.cat([s[::10, :width] for s in sequences])


@pytest.fixture(scope="module")
def trained(model: TransformerBridge, rows: torch.Tensor) -> list[Trained]:
    torch.manual_seed(0)
    return [
        train_dictionary(
            model, rows, f"blocks.{i}.ln2.hook_out", point_out=f"blocks.{i}.hook_mlp_out", n_features=64, k=8, epochs=15, learning_rate=4e-3
        )
        for i in LAYERS
    ]


@pytest.fixture(scope="module")
def pairs(model: TransformerBridge) -> PromptPairs:
    return ioi(model, 6, seed=1)


def test_training_finds_what_is_written(model: TransformerBridge, rows: torch.Tensor, trained: list[Trained]) -> None:
    """A random dictionary of the same kind misses almost everything."""
    for one in trained:
        random = random_dictionary(one.dictionary.point_in, one.dictionary.point_out, d_in=64, kind="topk").to(torch.zeros(()))
        assert one.quality.variance_unexplained < 0.5 < measure_quality(model, random, rows[:10]).variance_unexplained
        assert one.quality.active <= 8
        assert one.quality.loss_recovered > 0.5
        assert one.dictionary.activation == TopK(8)


def test_training_goes_on_from_its_checkpoint(model: TransformerBridge, rows: torch.Tensor, tmp_path: Path) -> None:
    settings = dict(n_features=16, k=4, seed=3)
    whole = train_dictionary(model, rows, "blocks.1.hook_resid_post", epochs=3, **settings)  # type: ignore[arg-type]
    train_dictionary(model, rows, "blocks.1.hook_resid_post", epochs=2, checkpoint=tmp_path, **settings)  # type: ignore[arg-type]
    rest = train_dictionary(model, rows, "blocks.1.hook_resid_post", epochs=3, checkpoint=tmp_path, **settings)  # type: ignore[arg-type]
    assert torch.equal(whole.dictionary.encoder, rest.dictionary.encoder)
    assert torch.equal(whole.dictionary.decoder[0], rest.dictionary.decoder[0])
    with pytest.raises(RelevanceError, match="of another training"):
        train_dictionary(model, rows, "blocks.2.hook_resid_post", epochs=3, checkpoint=tmp_path, **settings)  # type: ignore[arg-type]


def test_saved_dictionaries_are_read_back(trained: list[Trained], tmp_path: Path) -> None:
    for one in trained:
        save_dictionary(one.dictionary, tmp_path / "set")
    for one, read in zip(trained, read_dictionaries(tmp_path / "set"), strict=True):
        same(one.dictionary, read)
    autoencoder = random_dictionary("blocks.1.hook_resid_post", d_in=64, kind="jumprelu", input_bias=torch.ones(64, dtype=torch.float64))
    save_dictionary(autoencoder.to(torch.zeros(())), tmp_path / "sae")
    x = torch.randn(3, 64)
    read = read_dictionary(tmp_path / "sae")
    mine = autoencoder.to(x)
    assert torch.allclose(read.decode(read.encode(x)), mine.decode(mine.encode(x)), atol=1e-5)
    with pytest.raises(RelevanceError, match="cannot be saved"):
        save_dictionary(random_dictionary("a", d_in=4, kind="gated"), tmp_path / "gated")


def same(one: Dictionary, two: Dictionary) -> None:
    assert (one.point_in, one.point_out, one.activation) == (two.point_in, two.point_out, two.activation)
    assert torch.equal(one.encoder, two.encoder) and torch.equal(one.decoder[0], two.decoder[0])


def test_the_ranking_is_what_propagate_says(model: TransformerBridge, trained: list[Trained], pairs: PromptPairs) -> None:
    given = [one.dictionary for one in trained]
    ranked = rank_features(model, pairs, given, batch_size=4)
    cache = propagate(model, pairs.clean, pairs.target, reference=pairs.corrupt, dictionaries=given, dictionary_path="model")
    for row in ranked.head(10).itertuples():
        relevance = cache.features(str(row.point)).to_dense()[..., int(row.feature)].sum(1).double()  # type: ignore[arg-type]
        assert float(row.score) == pytest.approx(float(relevance.mean()), rel=1e-3)  # type: ignore[arg-type]
        assert float(row.standard_error) == pytest.approx(float(relevance.std() / len(pairs) ** 0.5), rel=1e-3)  # type: ignore[arg-type]
    magnitude = ranked["score"].abs().to_numpy()
    assert (np.diff(magnitude) <= 0).all() and magnitude[0] > 0.01
    with pytest.raises(RelevanceError, match="at least one dictionary"):
        rank_features(model, pairs, [])


def test_ablation_of_a_feature_is_the_forward_with_it_moved(model: TransformerBridge, trained: list[Trained], pairs: PromptPairs) -> None:
    given = [one.dictionary for one in trained]
    ranked = rank_features(model, pairs, given)
    top = ranked[ranked["layer"] == 2].iloc[0]
    feature, dictionary = int(top["feature"]), given[1]
    noising, denoising, mean = (
        ablate_features(model, pairs, given, features=[(1, feature), (0, 0)], direction=direction)[0]  # type: ignore[arg-type]
        for direction in ("noising", "denoising", "mean")
    )
    assert torch.allclose((noising + denoising) / 2, mean)
    _, clean = model.run_with_cache(pairs.clean)
    _, corrupt = model.run_with_cache(pairs.corrupt)
    name = "blocks.2.ln2.hook_out"
    change = (dictionary.encode(corrupt[name]) - dictionary.encode(clean[name]))[..., feature].unsqueeze(-1) * dictionary.decoder[0][
        feature
    ]
    moved = model.run_with_hooks(pairs.clean, fwd_hooks=[("blocks.2.hook_mlp_out", lambda y, hook: y + change)])
    metric = pairs.metric(model)
    expected = (metric(model(pairs.clean)) - metric(moved)).double()
    expected = expected.detach()
    assert float(expected.abs().max()) > 1e-3
    assert torch.allclose(noising, expected, atol=1e-5)
    with pytest.raises(RelevanceError, match="out of range"):
        ablate_features(model, pairs, given, features=[(3, 0)])


def test_relevance_agrees_with_ablation(model: TransformerBridge, trained: list[Trained], pairs: PromptPairs) -> None:
    table = compare_features(model, pairs, [one.dictionary for one in trained], n_features=45, resamples=50)
    whole = table[table["point"] == "all"].set_index("method")
    assert float(whole.loc["deeplift", "pearson"]) > 0.9  # type: ignore[arg-type]
    assert set(whole.index) == {"deeplift", "gradient", "relp", "integrated_gradients"}
    assert (whole["pearson_low"] <= whole["pearson"]).all() and (whole["features"] == 45).all()
    assert len(table) == 4 * (1 + len(trained)) and table[table["point"] != "all"].groupby("method")["features"].sum().eq(45).all()
    given = [one.dictionary for one in trained]
    compared = compare_with_patching(model, pairs, components=["features"], dictionaries=given, n_features=45, resamples=50)
    assert set(compared["component"]) == {"features"} and compared["pearson"].is_monotonic_decreasing
    same = compared.set_index("method").loc[["deeplift", "gradient", "relp"], "pearson"]
    pd.testing.assert_series_equal(same, whole.loc[["deeplift", "gradient", "relp"], "pearson"], check_exact=True)
    with pytest.raises(RelevanceError, match="by themselves"):
        compare_with_patching(model, pairs, components=["features", "heads"], dictionaries=given)
    with pytest.raises(RelevanceError, match="needs dictionaries"):
        compare_with_patching(model, pairs, components=["features"])
    with pytest.raises(RelevanceError, match="are asked for"):
        compare_features(model, pairs, [one.dictionary for one in trained], n_features=4500)


def test_labels_are_top_tokens_of_the_decoder(model: TransformerBridge) -> None:
    """A feature that writes what a token's unembedding reads raises that token."""
    sites = {site.name: site.operation for site in __import__("lens_relevance.sites", fromlist=["anatomy"]).anatomy(model).sites}
    token = model.to_single_token(" Mary")
    direction = sites["unembed"].weight[token] * sites["ln_final"].weight  # type: ignore[attr-defined]
    decoder = torch.stack([direction, -direction])
    dictionary = Dictionary(torch.zeros(2, 64), torch.zeros(2), (decoder,), torch.zeros(64), ReLU(), "a", ("b",))
    labels = label_features(model, dictionary, [0, 1], k=2)
    assert labels["raises"][0].split(" | ")[0].strip() == "Mary" == labels["lowers"][1].split(" | ")[0].strip()
    with pytest.raises(RelevanceError, match="out of range"):
        label_features(model, dictionary, [2])
    with pytest.raises(RelevanceError, match="vectors of size 4"):
        label_features(model, random_dictionary("a", d_in=4), [0])


def test_text_becomes_rows(model: TransformerBridge) -> None:
    rows = token_rows(model, "Mary and John went to the store . " * 20, 16)
    assert rows.shape[1] == 16 and len(rows) > 3
    assert len({int(row[0]) for row in rows}) == 1  # each begins with the model's first token
    x, y = next(activations(model, rows, "blocks.1.ln2.hook_out", point_out="blocks.1.hook_mlp_out"))
    assert x.shape == y.shape == (len(rows) * 15, 64)
    with pytest.raises(RelevanceError, match="fill no row"):
        token_rows(model, "Mary", 16)
