"""What patching must give whatever the model."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import activation_patching
from analyses.tasks import PromptPairs
from lens_relevance.inputs.targets import logit_diff
from tests.analyses.patching.helpers import make_pairs, run_patched


def test_setting_the_whole_stream_gives_the_clean_run(family: tuple[TransformerBridge, str]) -> None:
    """Also resid_mid, which TransformerLens sets on the branch into the MLP only."""
    model, _ = family
    pairs = make_pairs()
    streams = ["resid_pre", "resid_mid", "resid_post"]
    if "ParallelBlockBridge" in type(model.blocks[0]).__name__:
        streams.remove("resid_mid")
        with pytest.raises(ValueError, match="no 'resid_mid' in block 0"):
            activation_patching(model, pairs, "resid_mid")
    result = activation_patching(model, pairs, streams, by_position=False)
    torch.testing.assert_close(result.patched, result.clean.expand_as(result.patched), atol=1e-5, rtol=0)
    assert (result.clean - result.corrupt).abs().min() > 1e-3


def test_resid_mid_by_position_reaches_the_residual_connection(gpt2: TransformerBridge) -> None:
    """In the last layer only the last position reaches the metric, and it reaches it as in the clean run."""
    result = activation_patching(gpt2, make_pairs(changed=(2, 5)), "resid_mid")
    last_layer = {node.position: patched for node, patched in zip(result.nodes, result.patched, strict=True) if node.layer == 1}
    torch.testing.assert_close(last_layer[5], result.clean, atol=1e-5, rtol=0)
    for position in range(5):
        torch.testing.assert_close(last_layer[position], result.corrupt, atol=1e-5, rtol=0)


def test_noising_is_denoising_of_the_swapped_pairs(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    swapped = PromptPairs(pairs.corrupt, pairs.clean, pairs.target)
    noising = activation_patching(gpt2, pairs, direction="noising")
    denoising = activation_patching(gpt2, pairs, direction="denoising")
    torch.testing.assert_close(noising.effect, -activation_patching(gpt2, swapped).effect)
    torch.testing.assert_close(noising.effect, noising.clean - noising.patched)
    mean = activation_patching(gpt2, pairs, direction="mean")
    torch.testing.assert_close(mean.effect, (noising.effect + denoising.effect) / 2)
    assert not torch.allclose(noising.effect, denoising.effect, atol=1e-3)
    with pytest.raises(ValueError, match="patched two runs"):
        _ = mean.patched


def test_a_trained_model(stories: TransformerBridge) -> None:
    """Two heads carry most of the pronoun."""
    clean = "Once upon a time, there was a little girl named Lily. Lily was very happy because"
    corrupt = "Once upon a time, there was a little boy named Tim. Tim was very happy because"
    clean_ids, corrupt_ids = stories.to_tokens(clean), stories.to_tokens(corrupt)
    pairs = PromptPairs(clean_ids, corrupt_ids, logit_diff("she", "he"))
    result = activation_patching(stories, pairs, "z", direction="noising")
    heads = result.to_dataframe().sort_values("effect", ascending=False)
    assert heads[["layer", "head"]].head(2).to_numpy().tolist() == [[4, 2], [4, 0]]
    with torch.no_grad():
        _, cache = stories.run_with_cache(corrupt_ids)
    she, he = stories.to_single_token("she"), stories.to_single_token("he")

    def edit(value: Tensor) -> Tensor:
        value[:, :, 2] = cache["blocks.4.attn.hook_z"][:, :, 2]
        return value

    expected = run_patched(stories, clean_ids, "blocks.4.attn.hook_z", edit)[0, -1]
    assert heads["patched"].iloc[0] == pytest.approx(float(expected[she] - expected[he]), abs=1e-5)


def test_tables(llama: TransformerBridge) -> None:
    result = activation_patching(llama, make_pairs(), ["resid_pre", "z", "k"], direction="mean")
    frame = result.to_dataframe()
    assert list(frame.columns[:5]) == ["component", "layer", "position", "head", "neuron"]
    assert {"effect", "patched_denoising", "baseline_noising", "effect_noising"} <= set(frame.columns)
    assert frame.groupby("component").size().to_dict() == {"resid": 12, "heads": 8, "k": 4}  # k counts key-value heads
    assert len(result.to_dataframe(per_pair=True)) == 3 * len(frame)
    grid = result.grid("resid_pre")
    assert grid.shape == (2, 6) and grid.columns.name == "position"
    assert grid.loc[1, 2] == pytest.approx(float(result.effect[6 + 2].mean()), abs=1e-6)
    assert isinstance(result.grid("z"), pd.DataFrame) and result.grid("z").columns.name == "head"
    with pytest.raises(ValueError, match="'q' was not patched"):
        result.grid("q")
