"""recompute=True: block by block, and the same bit by bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from lens_relevance import RelevanceCache, RelevanceError, engine, latent, logit, logit_diff, mean_embedding, propagate, random_tokens
from lens_relevance.hooks import storage
from lens_relevance.memory import free_memory
from tests.classifiers import build_classifier, inputs_for
from tests.encoder_decoders import build_encoder_decoder, sources_and_targets
from tests.engine.families import FAMILIES, PAIRS, TARGET, build, inputs_and_reference, reference_for
from tests.wider_models import WIDER, build_wider

TOKENS, OTHER = inputs_and_reference()
GROUPS = ("activations", "coefficients", "reference_activations", "averaged")


def everything(name: str) -> bool:
    return True


def both(model: Any, inputs: Any, target: Any, rules: str, **settings: Any) -> tuple[RelevanceCache, RelevanceCache]:
    """The run at once, and the one block by block; every HookPoint's tensors, values and logits are the same bit by bit."""
    at_once, block_by_block = (propagate(model, inputs, target, rules=rules, **settings, recompute=flag) for flag in (False, True))
    for group in GROUPS:
        expected, actual = getattr(at_once, group), getattr(block_by_block, group)
        assert list(actual) == list(expected), group
        for name in expected:
            assert torch.allclose(actual[name], expected[name], rtol=0, atol=0, equal_nan=True), (rules, group, name)
    assert torch.equal(block_by_block.logits, at_once.logits)
    assert torch.equal(block_by_block.value, at_once.value)
    assert set(block_by_block.absent) == set(at_once.absent)
    assert float(at_once.tokens().abs().sum()) > 0
    return at_once, block_by_block


@pytest.mark.parametrize("family", FAMILIES)
def test_bit_equal_at_every_hook_point(family: str) -> None:
    model = build(family, torch.float32, n_layers=3)
    for rules in ("attnlrp", "gim", "deeplift"):
        both(model, TOKENS, TARGET, rules, names_filter=everything, reference=reference_for(rules, OTHER))


@pytest.mark.parametrize("family", WIDER)
def test_bit_equal_on_wider_families(family: str) -> None:
    model = build_wider(family, torch.float32)
    both(model, TOKENS, TARGET, "deeplift", names_filter=everything, reference=OTHER)


@pytest.mark.parametrize("family", ["vit", "bert_classifier"])
def test_bit_equal_on_classifiers(family: str) -> None:
    model, (one, two) = build_classifier(family, torch.float32), inputs_for(family, torch.float32)
    both(model, one, logit(2), "attnlrp", names_filter=everything)
    both(model, one, logit(2), "deeplift", names_filter=everything, reference=two)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("settings", [{}, {"reference": mean_embedding()}, {"reference": random_tokens(3)}, {"reference": OTHER}])
def test_bit_equal_for_every_kind_of_reference_with_padding(family: str, settings: dict[str, Any]) -> None:
    model, mask = build(family, torch.float32, n_layers=4), torch.ones_like(TOKENS)
    mask[0, :2] = 0
    rules = "deeplift" if settings else "attnlrp"
    both(model, TOKENS, TARGET, rules, names_filter=everything, attention_mask=mask, **settings)
    both(model, TOKENS, None, rules, **settings)


@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
@pytest.mark.parametrize(
    "name", ["embed.hook_out", "blocks.0.hook_in", "blocks.1.mlp.out.hook_in", "blocks.2.hook_out", "ln_final.hook_out"]
)
def test_a_latent_in_any_part(name: str, rules: str) -> None:
    model = build("gpt2", torch.float32, n_layers=4)
    both(model, TOKENS, latent(name, unit=1), rules, names_filter=everything, reference=reference_for(rules, OTHER))


@pytest.mark.parametrize(
    "through",
    [
        {"embed.hook_out": {"position": [2]}},
        {"blocks.1.attn.hook_z": {"head": [1]}},
        {"blocks.3.mlp.hook_post": {"unit": [3]}},
        {"blocks.1.hook_resid_pre": {"position": [3]}, "blocks.2.mlp.hook_post": {"unit": [3, 4]}},
    ],
)
def test_conditions_in_any_part(through: dict[str, Any]) -> None:
    both(build("gpt2", torch.float32, n_layers=4), TOKENS, TARGET, "attnlrp", names_filter=everything, through=through)


def test_a_condition_above_a_latent_is_an_error() -> None:
    model = build("gpt2", torch.float32, n_layers=4)
    with pytest.raises(RelevanceError, match="through"):
        propagate(
            model, TOKENS, latent("blocks.1.hook_out", unit=0), rules="attnlrp", through={"blocks.2.hook_in": {"unit": [1]}}, recompute=True
        )


@pytest.mark.parametrize("rules", ["attnlrp", *PAIRS])
def test_the_account_is_the_same(rules: str) -> None:
    model = build("llama", torch.float32, n_layers=4)
    at_once, again = both(model, TOKENS, TARGET, rules, reference=reference_for(rules, OTHER), audit=True)
    assert again.conservation().equals(at_once.conservation())


def test_one_block() -> None:
    both(build("gpt2", torch.float32, n_layers=1), TOKENS, TARGET, "deeplift", names_filter=everything, reference=OTHER)


def test_hooks_of_the_user_act_in_both_runs_of_a_block() -> None:
    model = build("llama", torch.float32, n_layers=4)
    plain = propagate(model, TOKENS, TARGET, rules="attnlrp")
    with model.hooks([("blocks.1.mlp.hook_post", lambda x, hook: x * 1.5), ("blocks.2.hook_in", lambda x, hook: x + 0.1)]):
        edited, _ = both(model, TOKENS, TARGET, "attnlrp", names_filter=everything)
    assert not torch.equal(edited.logits, plain.logits)
    module = model.blocks[1]
    handle = module.register_forward_pre_hook(lambda _, args: (args[0] * 1.1, *args[1:]))
    edited, _ = both(model, TOKENS, TARGET, "deeplift", names_filter=everything, reference=OTHER)
    handle.remove()
    assert not torch.equal(edited.logits, plain.logits)


def test_a_hook_that_changes_from_call_to_call_is_refused_and_the_model_left_as_found() -> None:
    model, calls = build("gpt2", torch.float32, n_layers=4), []

    def drifting(x: Tensor, hook: Any) -> Tensor:
        calls.append(hook.name)
        return x + 0.1 * len(calls)

    with model.hooks([("blocks.1.mlp.hook_post", drifting)]):
        with pytest.raises(RelevanceError, match="blocks.1 gave another value"):
            propagate(model, TOKENS, TARGET, rules="attnlrp", recompute=True)
    assert torch.is_grad_enabled()
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks)
    both(model, TOKENS, TARGET, "attnlrp")


def test_models_that_are_no_single_chain_are_refused() -> None:
    source, _ = sources_and_targets()
    with pytest.raises(RelevanceError, match="encoder, decoder"):
        propagate(build_encoder_decoder("t5", torch.float32), source, logit_diff(3, 4), rules="attnlrp", recompute=True)


def test_a_tensor_handed_beside_the_residual_stream_is_refused() -> None:
    model = build("llama", torch.float32, n_layers=4)
    kept: list[Tensor] = []
    keep = model.embed.register_forward_hook(lambda _, args, output: kept.append(output))
    block = model.blocks[1]
    handed = register_module_forward_pre_hook(lambda module, args: (*args, kept[-1]) if module is block else None)
    try:
        with pytest.raises(RelevanceError, match="beside the residual stream"):
            propagate(model, TOKENS, TARGET, rules="attnlrp", recompute=True)
    finally:
        keep.remove()
        handed.remove()


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_in_a_folder(tmp_path: Path, recompute: bool) -> None:
    """Each tensor in a file of its own, mapped into memory; each call in a folder of its own; the same values bit by bit."""
    model = build("llama", torch.float32, n_layers=3)
    settings: dict[str, Any] = dict(rules="deeplift", reference=OTHER, names_filter=everything, recompute=recompute)
    plain = propagate(model, TOKENS, TARGET, **settings)
    first, second = (propagate(model, TOKENS, TARGET, device=tmp_path / "kept", **settings) for _ in range(2))
    assert len(list((tmp_path / "kept").iterdir())) == 2
    for cache in (first, second):
        for group in GROUPS:
            expected, actual = getattr(plain, group), getattr(cache, group)
            assert list(actual) == list(expected)
            for name in expected:
                assert torch.allclose(actual[name], expected[name], rtol=0, atol=0, equal_nan=True), (group, name)
        assert torch.equal(cache.tokens(), plain.tokens()) and bool(cache.tokens().any())
    files = {Path(line.split(maxsplit=5)[5].strip()) for line in _mapped() if str(tmp_path) in line}
    kept = [path for path in tmp_path.rglob("*.pt")]
    assert len(files) >= 2 * sum(len(getattr(plain, group)) for group in GROUPS) and files <= set(kept)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, on a disk; 16 KiB of what is kept stay in memory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(free_memory, "_in_memory", lambda folder: False)
    monkeypatch.setattr(engine, "IN_MEMORY", 2**14)
    return tmp_path


def test_what_is_more_goes_to_temporary_files(temporary: Path) -> None:
    """The same values bit by bit, in files without a name: nothing is left of them when the cache is gone, nor after an exception."""
    model = build("llama", torch.float32, n_layers=3)
    settings: dict[str, Any] = dict(rules="deeplift", reference=OTHER, names_filter=everything)
    plain, cache = (propagate(model, TOKENS, TARGET, recompute=recompute, **settings) for recompute in (False, True))
    groups = [(getattr(plain, group), getattr(cache, group)) for group in GROUPS]
    for expected, actual in groups:
        for name in expected:
            assert torch.allclose(actual[name], expected[name], rtol=0, atol=0, equal_nan=True), name
            assert actual[name].stride() == expected[name].stride()
    assert list(temporary.iterdir()) == []
    mapped = [line for line in _mapped() if str(temporary) in line]
    kept = [tensor for _, actual in groups for tensor in actual.values()]
    in_memory = [tensor for tensor in kept if not _is_mapped(tensor)]
    assert 0 < sum(tensor.nbytes for tensor in in_memory) <= 2**14 and len(mapped) >= len(kept) - len(in_memory)
    del cache, groups, kept, in_memory, actual, expected
    assert not any(str(temporary) in line for line in _mapped())
    model.blocks[0].mlp.hook_out.add_hook(lambda gradient, hook: 1 / 0, dir="bwd")
    with pytest.raises(ZeroDivisionError):
        propagate(model, TOKENS, TARGET, recompute=True, **settings)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("lacks", ["room", "a disk", "what is written"])
def test_without_room_for_temporary_files_all_stays_in_memory(lacks: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor, file: Path) -> None:
        file.write_bytes(b"a part")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    if lacks == "room":
        monkeypatch.setattr(storage, "free_for_files", lambda: 100)
    elif lacks == "a disk":
        monkeypatch.setattr(free_memory, "_in_memory", lambda folder: True)
    else:
        monkeypatch.setattr(torch, "save", full)
    model = build("llama", torch.float32, n_layers=3)
    plain, cache = (propagate(model, TOKENS, TARGET, rules="attnlrp", recompute=recompute) for recompute in (False, True))
    assert torch.equal(cache.tokens(), plain.tokens()) and not any(map(_is_mapped, cache.coefficients.values()))
    assert list(temporary.iterdir()) == []


def test_a_folder_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensor: Tensor, file: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RelevanceError, match=rf"cannot be written to {tmp_path}.*give another folder as device="):
        propagate(build("llama", torch.float32), TOKENS, TARGET, rules="attnlrp", device=tmp_path)


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a mapped file."""
    at = tensor.untyped_storage().data_ptr()
    spans = (line.split() for line in _mapped())
    return any(int(span.split("-")[0], 16) <= at < int(span.split("-")[1], 16) and "relevance-" in " ".join(rest) for span, *rest in spans)


def _mapped() -> list[str]:
    """What this process has mapped into memory; empty where the system does not say."""
    maps = Path("/proc/self/maps")
    return maps.read_text().splitlines() if maps.exists() else pytest.skip("needs /proc/self/maps")


def test_only_what_is_kept_is_written(tmp_path: Path) -> None:
    """A view of a large tensor takes the space of its own entries."""
    model = build("gpt2", torch.float32, n_layers=2)
    cache = propagate(model, TOKENS, TARGET, rules="attnlrp", names_filter="blocks.0.attn.hook_q", device=tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.pt"))
    tensors = 2 * cache["blocks.0.attn.hook_q"].numel() * 4
    assert tensors <= size <= tensors + 2 * 4096
