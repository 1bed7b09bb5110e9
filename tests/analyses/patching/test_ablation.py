"""Zero and mean ablation against whole patched runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, Node
from analyses.patching import ablation
from tests.analyses.patching.helpers import last_logit_diff, make_pairs, padded, run_patched


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_ablation_equals_whole_patched_runs(family: tuple[TransformerBridge, str], value: Any) -> None:
    model, _ = family
    pairs = make_pairs()
    result = ablation(model, pairs, ["z", "mlp_out", "pattern"], value=value)
    assert result.corrupt is None and result.runs[0].direction == value
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        baseline = last_logit_diff(model(pairs.clean))
    for node, effect in list(zip(result.nodes, result.effect, strict=True))[::4]:
        name = COMPONENTS[node.component].write_at(node.layer)
        new = clean[name].mean(0, keepdim=True) if value == "mean" else torch.zeros_like(clean[name][:1])

        def edit(old: Tensor, node: Node = node, new: Tensor = new) -> Tensor:
            at: Any = {"heads": (..., node.head, slice(None)), "pattern": (slice(None), node.head)}.get(
                node.component, (slice(None), node.position)
            )
            old[at] = new.expand_as(old)[at]
            return old

        torch.testing.assert_close(effect, baseline - last_logit_diff(run_patched(model, pairs.clean, name, edit)), atol=1e-5, rtol=0)
    assert result.effect.abs().max() > 1e-2


def test_mean_ablation_over_parts_and_padding(gpt2: TransformerBridge) -> None:
    """The mean is that of all pairs however they are split, and of real tokens only."""
    pairs = padded("right")
    whole = ablation(gpt2, pairs, ["mlp_out", "resid_mid"], value="mean")
    split = ablation(gpt2, pairs, ["mlp_out", "resid_mid"], value="mean", batch_size=1)
    torch.testing.assert_close(whole.effect, split.effect, atol=1e-5, rtol=0, equal_nan=True)
    last = next(number for number, node in enumerate(whole.nodes) if node == Node("mlp_out", 0, 6))
    assert whole.effect[last, 0] == pytest.approx(0, abs=1e-6), "one pair has a token there: it is its own mean"
    assert whole.effect[last, 1:].isnan().all()
