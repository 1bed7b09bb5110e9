"""RelevanceCache reads like an ActivationCache, refuses what it has not kept, and survives the disk."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from transformer_lens import ActivationCache

from lens_relevance import NotKeptError, RelevanceCache, RelevanceError, propagate, random_tokens
from tests.engine.families import TARGET, build, close, inputs_and_reference
from tests.models import build_gpt2, build_llama

TOKENS, OTHER = inputs_and_reference()


@pytest.fixture(scope="module")
def cache() -> RelevanceCache:
    return propagate(build_gpt2(dtype=torch.float64), TOKENS, TARGET, rules="attnlrp", audit=True)


@pytest.fixture(scope="module")
def pair() -> RelevanceCache:
    return propagate(build_gpt2(dtype=torch.float64), TOKENS, TARGET, reference=OTHER, audit=True)


def test_what_is_kept_by_default(cache: RelevanceCache) -> None:
    blocks = [f"blocks.{i}.{point}" for i in (0, 1) for point in ("hook_in", "attn.o.hook_in", "mlp.out.hook_in")]
    assert set(cache) == {"embed.hook_out", "pos_embed.hook_out", *blocks, "blocks.1.hook_out"}
    assert len(cache) == 9 and set(cache.keys()) == set(cache)


def test_names(cache: RelevanceCache) -> None:
    """Aliases, canonical names and short forms are one and the same."""
    for i in (0, 1):
        z = cache[f"blocks.{i}.attn.o.hook_in"]
        assert z.shape == (2, 6, 4, 4)
        assert torch.equal(z, cache[f"blocks.{i}.attn.hook_z"]) and torch.equal(z, cache["z", i])
        assert torch.equal(cache[f"blocks.{i}.hook_in"], cache["resid_pre", i])
        assert torch.equal(cache[f"blocks.{i}.mlp.out.hook_in"], cache["post", i])
        assert cache.canonical(("z", i)) == f"blocks.{i}.attn.o.hook_in" and ("z", i) in cache
    assert torch.equal(cache["hook_embed"], cache["embed.hook_out"])
    assert "blocks.0.attn.hook_z" in cache and "blocks.0.attn.hook_pattern" not in cache


def test_relevance_is_activation_times_coefficient(cache: RelevanceCache, pair: RelevanceCache) -> None:
    for name in cache:
        close(cache[name], cache.activations[name] * cache.coefficients[name], 1e-15)
        if name != "pos_embed.hook_out":
            close(pair[name], (pair.activations[name] - pair.reference_activations[name]) * pair.coefficients[name], 1e-15)
    plain = build_gpt2(dtype=torch.float64)
    _, theirs = plain.run_with_cache(TOKENS)
    _, other = plain.run_with_cache(OTHER)
    for name in ("blocks.0.attn.hook_z", "blocks.1.hook_in", "blocks.1.mlp.hook_post", "hook_embed"):
        canonical = cache.canonical(name)
        close(cache.activations[canonical], theirs[name].detach(), 1e-15)
        close(pair.reference_activations[canonical], other[name].detach(), 1e-15)


def test_views(cache: RelevanceCache) -> None:
    close(cache.tokens(), cache["embed.hook_out"].sum(-1), 1e-15)
    close(cache.positions(), cache["pos_embed.hook_out"].sum(-1), 1e-15)
    heads, residual, neurons = cache.heads(), cache.residual(), cache.neurons(1)
    assert heads.shape == (2, 6, 2, 4) and residual.shape == (2, 6, 3) and neurons.shape == (2, 6, 64)
    close(heads[:, :, 1], cache["z", 1].sum(-1), 1e-15)
    close(residual[:, :, 2], cache["blocks.1.hook_out"].sum(-1), 1e-15)
    close(cache.neurons(-1), neurons, 1e-15)
    assert cache.value.shape == (2,) and cache.logits.shape == (2, 1, 50)
    close(cache.value, cache.logits[:, -1, 7] - cache.logits[:, -1, 11], 1e-14)
    with pytest.raises(RelevanceError, match="2 layers"):
        cache.neurons(2)


@pytest.mark.parametrize("name", ["blocks.0.attn.hook_pattern", "blocks.1.attn.q.hook_out", ("q", 1)])
def test_what_was_not_kept_is_refused_with_the_remedy(cache: RelevanceCache, name: str | tuple[str, int]) -> None:
    with pytest.raises(NotKeptError, match="names_filter") as caught:
        cache[name]
    assert "not kept" in str(caught.value) and isinstance(caught.value, KeyError) and isinstance(caught.value, RelevanceError)


def test_other_refusals(cache: RelevanceCache) -> None:
    with pytest.raises(NotKeptError, match="no HookPoint 'blocks.0.nothing'"):
        cache["blocks.0.nothing"]
    few = propagate(build_gpt2(), TOKENS, TARGET, names_filter="blocks.0.attn.hook_z")
    assert list(few) == ["blocks.0.attn.o.hook_in"]
    for view in (few.tokens, few.residual, few.heads, lambda: few.neurons(0), few.conservation):
        with pytest.raises(NotKeptError):
            view()
    with pytest.raises(NotKeptError):
        propagate(build_llama(), TOKENS, TARGET).positions()


def test_names_filter() -> None:
    model = build_gpt2()
    seen: list[str] = []

    def predicate(name: str) -> bool:
        seen.append(name)
        return name.endswith("q.hook_out")

    cache = propagate(model, TOKENS, TARGET, names_filter=predicate)
    assert set(cache) == {"blocks.0.attn.q.hook_out", "blocks.1.attn.q.hook_out"}
    assert set(seen) == {point.name for point in model.hook_dict.values()}  # canonical names, each point once or more
    assert "blocks.0.attn.hook_q" not in seen and "blocks.0.attn.hook_q" in cache
    both = propagate(model, TOKENS, TARGET, names_filter=["blocks.0.attn.hook_z", "blocks.0.attn.o.hook_in", "hook_embed"])
    assert set(both) == {"blocks.0.attn.o.hook_in", "embed.hook_out"}
    pattern = propagate(model, TOKENS, TARGET, names_filter="blocks.0.attn.hook_pattern")
    assert pattern["pattern", 0].shape == (2, 4, 6, 6)


def test_a_choice_of_names_changes_no_number() -> None:
    model = build_gpt2(dtype=torch.float64)
    everything = propagate(model, TOKENS, TARGET, rules="attnlrp", names_filter=lambda name: True)
    default = propagate(model, TOKENS, TARGET, rules="attnlrp")
    for name in default:
        close(default[name], everything[name], 1e-12)
        alone = propagate(model, TOKENS, TARGET, rules="attnlrp", names_filter=name)
        close(alone[name], default[name], 1e-12)


def test_to_frame(cache: RelevanceCache) -> None:
    frame = cache.to_frame()
    assert list(frame.columns) == ["example", "name", "position", "head", "relevance"]
    z = frame[frame["name"] == "blocks.1.attn.o.hook_in"].set_index(["example", "position", "head"])["relevance"]
    assert len(z) == 2 * 6 * 4 and z[1, 3, 2] == pytest.approx(float(cache.heads()[1, 3, 1, 2]))
    tokens = frame[frame["name"] == "embed.hook_out"]
    assert (tokens["head"] == -1).all() and tokens["relevance"].tolist() == pytest.approx(cache.tokens().flatten().tolist())


def test_to_activation_cache(cache: RelevanceCache) -> None:
    theirs = cache.to_activation_cache(build_gpt2(dtype=torch.float64))
    assert isinstance(theirs, ActivationCache)
    assert torch.equal(theirs["z", 0], cache["z", 0]) and torch.equal(theirs["blocks.1.hook_in"], cache["resid_pre", 1])


@pytest.mark.parametrize("kind", ["single", "pair", "several", "bf16"])
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = build_gpt2(dtype=torch.bfloat16 if kind == "bf16" else torch.float64)
    reference = {"pair": OTHER, "several": random_tokens(2)}.get(kind)
    rules = "attnlrp" if reference is None else "deeplift"
    cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, audit=True, names_filter=lambda name: True)
    path = tmp_path / "relevance.safetensors"
    cache.save(path)
    back = RelevanceCache.load(path)
    assert list(back) == sorted(cache) or set(back) == set(cache)
    for name in cache:
        assert torch.equal(back[name], cache[name]) and torch.equal(back.coefficients[name], cache.coefficients[name])
        assert back.activations[name].dtype == cache.activations[name].dtype
    for attribute in ("value", "logits", "logit_positions", "input_tokens", "mask"):
        assert torch.equal(getattr(back, attribute), getattr(cache, attribute))
    assert (back.reference_value is None) == (reference is None)
    assert back.info == cache.info and back.n_layers == 2 and back.aliases == cache.aliases and back.absent == cache.absent
    pd.testing.assert_frame_equal(back.conservation(), cache.conservation(), rtol=1e-12, check_dtype=False)
    assert torch.equal(back["z", 1], cache["z", 1]) and torch.equal(back.heads(), cache.heads())


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(RelevanceError, match="not written by"):
        RelevanceCache.load(tmp_path / "other.safetensors")


def test_info(pair: RelevanceCache) -> None:
    info = pair.info
    assert info["dtype"] == "float64" and info["ruleset"] == "deeplift" and info["reference"] != "none"
    assert {"model", "target", "lens_relevance", "transformer_lens", "torch"} <= set(info)
    assert propagate(build_gpt2(), TOKENS, TARGET, rules={}).info["ruleset"] in ("gradient", "custom")
    assert propagate(build_gpt2(), TOKENS, TARGET, reference=random_tokens(2, seed=7)).info["reference"] == "random_tokens(n=2, seed=7)"


def test_device_moves_what_is_kept() -> None:
    """`meta` stands in for a second device."""
    cache = propagate(build_gpt2(), TOKENS, TARGET, device="cpu")
    assert all(t.device.type == "cpu" for t in cache.coefficients.values())
    moved = propagate(build_gpt2(), TOKENS, TARGET, reference=OTHER, device="meta")
    for group in (moved.activations, moved.coefficients, moved.reference_activations):
        assert group and all(t.device.type == "meta" for t in group.values())


def test_two_hookpoints_with_one_tensor_have_a_coefficient_each() -> None:
    """A block's input is also its first norm's input; the coefficient of the branch is not that of the stream."""
    cache = propagate(build("gpt2"), TOKENS, TARGET, names_filter=["blocks.1.hook_in", "blocks.1.ln1.hook_in", "blocks.1.hook_attn_out"])
    close(
        cache.coefficients["blocks.1.hook_in"],
        cache.coefficients["blocks.1.ln1.hook_in"] + cache.coefficients["blocks.1.attn.hook_out"],
        1e-12,
    )
    assert (cache.coefficients["blocks.1.hook_in"] - cache.coefficients["blocks.1.ln1.hook_in"]).abs().max() > 1e-3


def test_coefficients_and_activations_are_read_by_any_name(cache: RelevanceCache) -> None:
    z = cache.coefficients["blocks.1.attn.hook_z"]
    assert z is cache.coefficients["blocks.1.attn.o.hook_in"] and z.abs().sum() > 0
    assert cache.activations["blocks.1.attn.hook_z"] is cache.activations["blocks.1.attn.o.hook_in"]
    with pytest.raises(NotKeptError, match="blocks.1.attn.hook_q was not kept"):
        cache.coefficients["blocks.1.attn.hook_q"]


def test_a_bare_cache_is_one_line(cache: RelevanceCache, pair: RelevanceCache) -> None:
    assert len(repr(cache)) < 300 and "\n" not in repr(cache)
    assert "attnlrp" in repr(cache) and f"{cache.value[0].item():.4g}" in repr(cache) and "9 HookPoints" in repr(cache)
    assert "deeplift" in repr(pair) and "against" in repr(pair)
