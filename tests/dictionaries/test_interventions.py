"""Features set to other values: equal to a HookPoint moved by hand, and to the ablation that is the yardstick of scores."""

from __future__ import annotations

import pytest
import torch

from analyses.dictionaries import ablate_features
from analyses.embedded import load_embedded
from analyses.interventions import From, Scale, intervene, set_units
from analyses.tasks import ioi
from lens_relevance import RelevanceError, logit_diff, propagate
from tests.dictionaries.random_dictionaries import random_dictionary

PROMPT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"
TRANSCODER = random_dictionary("blocks.1.ln2.hook_out", "blocks.1.hook_mlp_out", d_in=64, kind="jumprelu", seed=3)
AUTOENCODER = random_dictionary("blocks.2.hook_resid_pre", d_in=64, seed=5, normalization="constant_norm")


def test_a_feature_at_a_value_moves_the_hook_point_along_its_decoder_row() -> None:
    model = load_embedded(dtype=torch.float64)
    read: list[torch.Tensor] = []
    values = torch.zeros(())

    def write(y: torch.Tensor, hook: object) -> torch.Tensor:
        nonlocal values
        values = TRANSCODER.encode(read[-1])[..., 4]
        y = y.clone()
        y[:, 3] += (2.5 - values[:, 3]).unsqueeze(-1) * TRANSCODER.decoder[0][4]
        return y

    with torch.no_grad():
        plain = model(PROMPT)
        hooks = [("blocks.1.ln2.hook_out", lambda x, hook: read.append(x)), ("blocks.1.hook_mlp_out", write)]
        expected = model.run_with_hooks(PROMPT, fwd_hooks=hooks)
        with set_units(model, {"L1F4@3": 2.5}, dictionaries=[AUTOENCODER, TRANSCODER]):
            found = model(PROMPT)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
        assert float((found - plain).abs().max()) > 1e-3
        with set_units(model, {"L1F4": Scale(1.0), "L2F3": Scale(1.0)}, dictionaries=[TRANSCODER, AUTOENCODER]):
            torch.testing.assert_close(model(PROMPT), plain, atol=1e-12, rtol=1e-12)
        assert torch.equal(model(PROMPT), plain)


@pytest.mark.parametrize(("index", "layer"), [(0, 1), (1, 2)])
def test_values_of_the_other_run_are_the_ablation_of_a_feature(index: int, layer: int) -> None:
    model, pairs, given = load_embedded(dtype=torch.float64), ioi(load_embedded(), n=2), [TRANSCODER, AUTOENCODER]
    features = [(index, feature) for feature in range(6)]
    effects = ablate_features(model, pairs, given, features=features, direction="noising")
    assert float(effects.abs().max()) > 1e-3
    for (_, feature), effect in zip(features, effects, strict=True):
        unit = {f"L{layer}F{feature}": From(pairs.corrupt)}
        found = intervene(model, pairs.clean, unit, target=pairs.target, dictionaries=given)
        torch.testing.assert_close(-found.change.double(), effect, atol=1e-9, rtol=1e-9)


def test_means_and_bad_settings() -> None:
    model, given = load_embedded(dtype=torch.float64), [TRANSCODER]
    _, cache = model.run_with_cache([PROMPT, OTHER])
    mean = float(TRANSCODER.encode(cache["blocks.1.ln2.hook_out"])[..., 4].mean())
    target = logit_diff(" Mary", " John")
    by_mean = intervene(model, PROMPT, {"L1F4": "mean"}, target=target, prompts=[PROMPT, OTHER], dictionaries=given)
    by_number = intervene(model, PROMPT, {"L1F4": mean}, target=target, dictionaries=given)
    torch.testing.assert_close(by_mean.after, by_number.after, atol=1e-9, rtol=1e-9)
    assert float(by_mean.change.abs()) > 1e-6
    with pytest.raises(RelevanceError, match="0 of the dictionaries write in layer 0"), set_units(model, {"L0F4": 0.0}, dictionaries=given):
        pass
    with pytest.raises(RelevanceError, match="out of range"), set_units(model, {"L1F99": 0.0}, dictionaries=given):
        pass
    with pytest.raises(RelevanceError, match="set twice"), set_units(model, {"L1F4": 0.0, "L1F4@2": 1.0}, dictionaries=given):
        pass
    with set_units(model, {"L1F4": 0.0}, dictionaries=given), pytest.raises(RelevanceError, match="while features are set"):
        propagate(model, PROMPT, target, reference=OTHER)
    with set_units(model, {"L1F4@90": 0.0}, dictionaries=given), pytest.raises(RelevanceError, match="positions"):
        model(PROMPT)
