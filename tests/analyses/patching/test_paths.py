"""Path patching against TransformerLens and whole patched runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformer_lens.patching as tl_patching
from jaxtyping import TypeCheckError
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import Node, activation_patching, path_patching
from tests import models
from tests.analyses.patching.helpers import FAMILIES, last_logit_diff, make_pairs, run_patched


@pytest.mark.parametrize("name,inputs", [("gpt2", "qkv"), ("neox_parallel", "qkv"), ("neox_sequential", "q"), ("llama", "q")])
def test_direct_paths_equal_transformer_lens(name: str, inputs: str, unchanged: Callable[..., Any]) -> None:
    model, pairs = FAMILIES[name][0](), make_pairs()
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        _, corrupt = model.run_with_cache(pairs.corrupt)
    unchanged(model)
    frame = path_patching(model, pairs, "z", receivers=list(inputs)).to_dataframe()
    assert frame["effect"].abs().max() > 1e-3
    for component in inputs:
        for sender in [(0, 0), (0, 3), (1, 2)]:
            expected = tl_patching.get_act_patch_direct_path(
                model,
                pairs.corrupt,
                clean,
                corrupt,
                lambda logits: last_logit_diff(logits).mean(),
                *sender,
                component=component,
                verbose=False,
            )
            rows = frame[(frame["sender_layer"] == sender[0]) & (frame["sender_head"] == sender[1]) & (frame["receiver"] == component)]
            assert len(rows) == 4 * (2 - sender[0])
            for row in rows.itertuples():
                assert row.patched == pytest.approx(float(expected[row.receiver_layer, row.receiver_head]), abs=1e-5)


@pytest.mark.parametrize("freeze", [("heads", "mlps"), ("heads",), ()])
@pytest.mark.parametrize("name", ["gpt2", "llama", "native"])
def test_paths_to_heads_and_logits_equal_whole_runs(name: str, freeze: Any) -> None:
    """The definition of Wang et al., done with whole forward passes."""
    model, pairs = FAMILIES[name][0](), make_pairs()
    sender, receiver = Node("z", 0, head=1), Node("z", 2, head=3)
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        _, corrupt = model.run_with_cache(pairs.corrupt)
    kept: dict[str, Tensor] = {}

    def send(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, 1] = clean["blocks.0.attn.hook_z"][:, :, 1]
        return value

    def hold(value: Tensor, hook: Any, name: str) -> Tensor:
        kept[name] = value.clone()
        return corrupt[name]

    hooks: list[Any] = [("blocks.0.attn.hook_z", send)]
    for layer in range(3):
        for kind, hook in (("heads", f"blocks.{layer}.attn.hook_z"), ("mlps", f"blocks.{layer}.hook_mlp_out")):
            if kind in freeze and hook != "blocks.0.attn.hook_z":
                hooks.append((hook, partial(hold, name=hook)))
    if "heads" not in freeze:
        hooks.append(("blocks.2.attn.hook_z", lambda value, hook: kept.update({"blocks.2.attn.hook_z": value.clone()})))
    with torch.no_grad():
        to_logits = last_logit_diff(model.run_with_hooks(pairs.corrupt, fwd_hooks=hooks, use_cache=False))

    def receive(value: Tensor) -> Tensor:
        value[:, :, 3] = kept["blocks.2.attn.hook_z"][:, :, 3]
        return value

    to_head = last_logit_diff(run_patched(model, pairs.corrupt, "blocks.2.attn.hook_z", receive))
    result = path_patching(model, pairs, sender, receivers=[receiver, "logits"], freeze=freeze)
    torch.testing.assert_close(result.run.patched, torch.stack([to_head, to_logits]), atol=1e-5, rtol=0)
    assert (result.effect.abs().max(dim=1).values > 1e-4).all()
    whole = path_patching(model, pairs, "z", receivers=["z", "logits"], freeze=freeze)  # many at once, by the shortcut
    number = whole.paths.index((sender, receiver))
    torch.testing.assert_close(whole.run.patched[number], to_head, atol=1e-5, rtol=0)


def test_direct_path_to_logits_is_the_write_of_the_head() -> None:
    """Without a final norm the direct effect is (z_clean - z_corrupt) W_O read along the logit difference."""
    model, pairs = models.build_native(normalization_type=None, n_layers=3), make_pairs(changed=(2, 5))
    result = path_patching(model, pairs, "z", receivers="logits")
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean)
        _, corrupt = model.run_with_cache(pairs.corrupt)
        direction = model.W_U[:, 3] - model.W_U[:, 5]
    for (sender, _), effect in zip(result.paths, result.effect, strict=True):
        z = f"blocks.{sender.layer}.attn.hook_z"
        write = (clean[z] - corrupt[z])[:, -1, sender.head] @ model.blocks[sender.layer].attn.W_O[sender.head]
        torch.testing.assert_close(effect, (write @ direction).detach(), atol=1e-5, rtol=0)
    noising = path_patching(model, pairs, "z", receivers="logits", direction="noising")
    torch.testing.assert_close(noising.effect, result.effect, atol=1e-5, rtol=0)  # linear: both directions agree


def test_path_errors(gpt2: TransformerBridge) -> None:
    pairs = make_pairs()
    with pytest.raises(ValueError, match="not from 'mlp'"):
        path_patching(gpt2, pairs, "mlp_out", receivers="q")
    with pytest.raises(ValueError, match="not to 'pattern'"):
        path_patching(gpt2, pairs, "z", receivers="pattern")
    with pytest.raises(ValueError, match="no path"):
        path_patching(gpt2, pairs, Node("z", 1, head=0), receivers=Node("q", 1, head=0))
    # with types checked at run time, as in this suite, the annotation speaks first
    with pytest.raises((ValueError, TypeCheckError), match="heads.*mlps"):
        path_patching(gpt2, pairs, "z", receivers="q", freeze=["norms"])  # type: ignore[list-item]
    with pytest.raises((ValueError, TypeCheckError), match="denoising.*noising"):
        path_patching(gpt2, pairs, "z", receivers="q", direction="mean")  # type: ignore[arg-type]
    with pytest.raises((ValueError, TypeCheckError), match="denoising.*noising.*mean"):
        activation_patching(gpt2, pairs, "z", direction="both")  # type: ignore[arg-type]
