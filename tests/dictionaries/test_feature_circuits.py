"""Circuits of features: every feature outside is set to its value in the other run, in the order of the model's computation."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import faithfulness_curve, top
from analyses.dictionaries import FeatureAblation, ablate_features
from analyses.embedded import load_embedded
from analyses.tasks import PromptPairs, ioi
from lens_relevance import Dictionary, RelevanceError
from tests.dictionaries.random_dictionaries import KINDS, random_dictionary

PLACES = {1: ("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out"), 2: ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post")}


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return load_embedded(dtype=torch.float64)


@pytest.fixture(scope="module")
def pairs(model: TransformerBridge) -> PromptPairs:
    return ioi(model, 3, seed=1)


def given(kind: str = "relu") -> list[Dictionary]:
    return [random_dictionary(*place, d_in=64, kind=kind, seed=layer) for layer, place in PLACES.items()]


def by_hand(model: TransformerBridge, pairs: PromptPairs, dictionaries: list[Dictionary], kept: set[str]) -> torch.Tensor:
    """One circuit, feature by feature."""
    _, corrupt = model.run_with_cache(pairs.corrupt)
    read: dict[int, torch.Tensor] = {}
    hooks = []
    for (layer, (reads, writes)), dictionary in zip(PLACES.items(), dictionaries, strict=True):

        def take(x: torch.Tensor, hook: object, layer: int = layer) -> None:
            read[layer] = x

        def move(y: torch.Tensor, hook: object, layer: int = layer, reads: str = reads, one: Dictionary = dictionary) -> torch.Tensor:
            for feature in range(one.n_features):
                if f"L{layer}F{feature}" not in kept:
                    change = one.encode(corrupt[reads])[..., feature] - one.encode(read[layer])[..., feature]
                    y = y + change.unsqueeze(-1) * one.decoder[0][feature]
            return y

        hooks += [(reads, take), (writes, move)]
    return pairs.metric(model)(model.run_with_hooks(pairs.clean, fwd_hooks=hooks))


@pytest.mark.parametrize("kind", ["relu", "topk", "gated"])
def test_a_circuit_is_the_run_with_all_others_set(model: TransformerBridge, pairs: PromptPairs, kind: str) -> None:
    assert kind in KINDS
    dictionaries = given(kind)
    ablation = FeatureAblation(model, pairs, dictionaries)
    names = ablation.items.frame["node"].tolist()
    assert {"L1", "L2"} == {name.partition("F")[0] for name in names}
    masks = torch.rand(4, len(names), generator=torch.Generator().manual_seed(0)) < 0.5
    found = ablation(masks)
    for mask, values in zip(masks, found, strict=True):
        expected = by_hand(model, pairs, dictionaries, {name for name, keep in zip(names, mask, strict=True) if keep})
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    assert float((found - ablation.full).abs().min()) > 1e-3
    torch.testing.assert_close(ablation.full, pairs.metric(model)(model(pairs.clean)).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ablation.empty, by_hand(model, pairs, dictionaries, set()), rtol=1e-9, atol=1e-9)


def test_one_feature_left_out_of_the_last_dictionary_is_its_ablation(model: TransformerBridge, pairs: PromptPairs) -> None:
    dictionaries = given()
    ablation = FeatureAblation(model, pairs, dictionaries)
    last = next(i for i, name in enumerate(ablation.items.frame["node"]) if name.startswith("L2"))
    feature = int(ablation.items.frame["node"][last].partition("F")[2])
    kept = torch.ones(1, len(ablation.items), dtype=torch.bool)
    kept[0, last] = False
    noising = ablate_features(model, pairs, dictionaries, features=[(1, feature)], direction="noising")[0]
    assert float(noising.abs().max()) > 1e-6
    torch.testing.assert_close((ablation.full - ablation(kept)[0]).double(), noising, rtol=1e-9, atol=1e-9)


def test_curves_of_methods(model: TransformerBridge, pairs: PromptPairs) -> None:
    ablation = FeatureAblation(model, pairs, given())
    curves = {method: faithfulness_curve(ablation, ablation.scores(method)) for method in ("deeplift", "random")}
    for curve in curves.values():
        ends = curve.frame["faithfulness"].iloc[[0, -1]].tolist()
        assert ends == pytest.approx([0.0, 1.0], abs=1e-12) and len(curve.frame) == len(ablation.items) + 1
    assert curves["deeplift"].cmd < 0.7 * curves["random"].cmd
    best = top(ablation.scores("deeplift"), 3)
    assert len(best) == 3


def test_what_is_refused(model: TransformerBridge, pairs: PromptPairs) -> None:
    two = [random_dictionary(*PLACES[1], d_in=64, seed=0), random_dictionary("blocks.1.hook_resid_post", d_in=64, seed=0)]
    with pytest.raises(RelevanceError, match="two dictionaries write in one layer"):
        FeatureAblation(model, pairs, two)
    with pytest.raises(RelevanceError, match="at least one dictionary"):
        FeatureAblation(model, pairs, [])
    ablation = FeatureAblation(model, pairs, given())
    with pytest.raises(RelevanceError, match="masks must have shape"):
        ablation(torch.ones(1, 3, dtype=torch.bool))
