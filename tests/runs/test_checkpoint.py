"""Checkpoints know their own run: one flipped bit, another hook, other frequencies or another target of the same name are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.checkpoint import Checkpoint
from analyses.evaluation.ranking import rank_heads
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, logit
from tests.analyses.test_ranking import random_pairs
from tests.models import build_gpt2, build_llama

PAIRS = random_pairs(9)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path, run: Callable[[], object], words: str) -> None:
    """An error with these words, and nothing changed in the folder."""
    before = files(folder)
    with pytest.raises(RelevanceError, match=words):
        run()
    assert files(folder) == before


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    run = {"analysis": "a test"}
    tensors = {"mean": torch.randn(2, 3), "count": torch.tensor(7)}
    checkpoint = Checkpoint(tmp_path, run)
    checkpoint.save("sums-0", tensors)
    path = tmp_path / "sums-0.safetensors"
    whole, passed = path.read_bytes(), []
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = checkpoint.load("sums-0")
        except RelevanceError as error:
            assert "delete that file" in str(error).lower()
        else:
            assert found is not None and found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
            passed.append(place // 8)
    data = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) > data > 0 and all(whole[place : place + 1].isspace() or 8 <= place < data for place in passed)


def test_parts_of_other_names_and_runs_are_refused(tmp_path: Path) -> None:
    for name in ("one", "other"):
        Checkpoint(tmp_path / name, {"analysis": name}).save("sums-0", {"mean": torch.ones(3)})
    one = tmp_path / "one"
    (one / "sums-1.safetensors").write_bytes((one / "sums-0.safetensors").read_bytes())
    refused(one, lambda: Checkpoint(one, {"analysis": "one"}).load("sums-1"), "damaged or of another run")
    (one / "sums-0.safetensors").write_bytes((tmp_path / "other" / "sums-0.safetensors").read_bytes())
    refused(one, lambda: Checkpoint(one, {"analysis": "one"}).load("sums-0"), "damaged or of another run")


def hooked(point: str, hook: Callable[..., Any], direction: str = "fwd", build: Callable[[], TransformerBridge] = build_gpt2) -> Any:
    model = build()
    model.hook_dict[point].add_hook(hook, dir=direction)
    return model


HOOKS: dict[str, tuple[Any, Any]] = {
    "another function": (
        lambda: hooked("blocks.0.hook_mlp_out", lambda x, hook: x * 2),
        lambda: hooked("blocks.0.hook_mlp_out", lambda x, hook: x * 2.01),
    ),
    "the same value, another gradient": (
        lambda: hooked("blocks.0.hook_mlp_out", lambda x, hook: x * 1),
        lambda: hooked("blocks.0.hook_mlp_out", lambda x, hook: x.detach() * 1),
    ),
    "on the backward": (
        lambda: hooked("blocks.0.hook_out", lambda g, hook: (g * 2,), "bwd"),
        lambda: hooked("blocks.0.hook_out", lambda g, hook: (g * 3,), "bwd"),
    ),
}


@pytest.mark.parametrize("name", list(HOOKS))
def test_another_hook_at_the_same_point_is_another_run(name: str, tmp_path: Path) -> None:
    one, other = HOOKS[name]
    first = rank_heads(one(), PAIRS, "relp", checkpoint=tmp_path, batch_size=4)
    refused(tmp_path, lambda: rank_heads(other(), PAIRS, "relp", checkpoint=tmp_path, batch_size=4), "another run .* differ")
    assert rank_heads(one(), PAIRS, "relp", checkpoint=tmp_path, batch_size=4).equals(first)


def test_a_hook_of_torch_is_seen(tmp_path: Path) -> None:
    rank_heads(build_gpt2(), PAIRS, checkpoint=tmp_path)
    model = build_gpt2()
    model.original_model.transformer.h[0].mlp.register_forward_hook(lambda module, inputs, output: output * 1.01)
    refused(tmp_path, lambda: rank_heads(model, PAIRS, checkpoint=tmp_path), "another run .*logits of clean prompts")


def test_other_rotary_frequencies_are_another_model(tmp_path: Path) -> None:
    first = rank_heads(build_llama(), PAIRS, checkpoint=tmp_path)
    changed, scaled = build_llama(), build_llama()
    rotary = changed.original_model.model.rotary_emb
    with torch.no_grad():
        rotary.inv_freq[-1] *= 1.001
    assert "inv_freq" not in " ".join(changed.state_dict())
    refused(tmp_path, lambda: rank_heads(changed, PAIRS, checkpoint=tmp_path), r"another run \(model: ")
    scaled.original_model.model.rotary_emb.attention_scaling *= 1.01  # no tensor
    refused(tmp_path, lambda: rank_heads(scaled, PAIRS, checkpoint=tmp_path), "another run .*logits of clean prompts")
    assert rank_heads(build_llama(), PAIRS, checkpoint=tmp_path).equals(first)


def of_tokens(answers: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that holds a token for each row, and does not say so."""
    return lambda logits: logits[torch.arange(len(answers)), -1, answers]


def test_another_function_of_the_same_name_is_another_target(tmp_path: Path) -> None:
    """Also where the two differ in the last row alone, which the first batch does not hold."""
    answers = torch.arange(9) % 5
    changed = answers.clone()
    changed[-1] += 1

    def rank(target: Callable[[Tensor], Tensor]) -> Any:
        pairs = PromptPairs(PAIRS.clean, PAIRS.corrupt, target)
        return rank_heads(build_gpt2(), pairs, "relp", checkpoint=tmp_path, batch_size=2)

    first = rank(of_tokens(answers))
    refused(tmp_path, lambda: rank(of_tokens(changed)), "another run .*target on random logits")
    refused(tmp_path, lambda: rank(of_tokens(answers + 1)), "another run .*the target on clean prompts")
    assert rank(of_tokens(answers)).equals(first)


def test_prompts_and_masks_of_every_row_are_part_of_a_run(tmp_path: Path) -> None:
    """Also where the two differ in the last row alone, which the first batch does not hold."""
    mask = torch.ones_like(PAIRS.clean)
    shorter = mask.clone()
    shorter[-1, -1] = 0

    def rank(clean: Tensor = PAIRS.clean, corrupt: Tensor = PAIRS.corrupt, *masks: Tensor) -> Any:
        return rank_heads(build_gpt2(), PromptPairs(clean, corrupt, logit(3), *masks), "relp", checkpoint=tmp_path, batch_size=2)

    def changed(tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:-1], (tokens[-1:] + 1) % 50])

    first = rank()
    for other in ((changed(PAIRS.clean),), (PAIRS.clean, changed(PAIRS.corrupt)), (PAIRS.clean, PAIRS.corrupt, shorter, shorter)):
        refused(tmp_path, lambda given=other: rank(*given), "another run .pairs: ")  # type: ignore[misc]
    assert rank(PAIRS.clean, PAIRS.corrupt, mask, mask).equals(first)


def test_logits_that_are_not_finite_are_no_other_run(tmp_path: Path) -> None:
    """A model that forbids a token: its logit is -inf in both runs."""

    def forbidding() -> TransformerBridge:
        def forbid(x: Tensor, hook: object) -> Tensor:
            return torch.cat([x[..., :-1], torch.full_like(x[..., -1:], -torch.inf)], -1)

        return hooked("unembed.hook_out", forbid)

    first = rank_heads(forbidding(), PAIRS, "relp", checkpoint=tmp_path)
    numbers = json.loads((tmp_path / "run.json").read_text())["numbers"]
    assert float("-inf") in numbers["logits of clean prompts (pairs)"]
    assert rank_heads(forbidding(), PAIRS, "relp", checkpoint=tmp_path).equals(first)


def test_rounding_is_no_other_run(tmp_path: Path) -> None:
    rank_heads(build_gpt2(), PAIRS, checkpoint=tmp_path)
    path = tmp_path / "run.json"
    run = json.loads(path.read_text())
    name = "logits of clean prompts (pairs)"
    largest = max(map(abs, run["numbers"][name]))
    for change, passes in ((1e-6, True), (1e-4, False)):
        moved = [number + change * largest for number in run["numbers"][name]]
        path.write_text(json.dumps(run | {"numbers": run["numbers"] | {name: moved}}))
        if passes:
            assert len(rank_heads(build_gpt2(), PAIRS, checkpoint=tmp_path))
        else:
            refused(tmp_path, lambda: rank_heads(build_gpt2(), PAIRS, checkpoint=tmp_path), "another run")
