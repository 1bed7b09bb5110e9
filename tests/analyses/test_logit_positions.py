"""Patching, circuits and perturbation compute logits only where the target reads them, and give what they give with all logits.

A hook on the unembedding makes them compute all logits: it must see all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from analyses.circuits import Ablation
from analyses.methods.base import activations
from analyses.patching import ablation, activation_patching, path_patching
from analyses.perturbation import BASELINES, TextRemoval, occlusion
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, continuation, log_prob, logit_diff
from lens_relevance.inputs.targets import as_target
from lens_relevance.logit_reading import logits_at
from tests import models
from tests.analyses.patching.helpers import last_logit_diff, make_pairs, padded
from tests.classifiers import build_classifier
from tests.engine.test_read_positions import widths

BUILDERS: dict[str, Any] = {
    "gpt2": models.build_gpt2,
    "llama": models.build_llama,
    "gemma2": models.build_gemma2,
    "native": lambda: models.build_native(output_logits_soft_cap=4.0),
}
PAIRS: dict[str, tuple[PromptPairs, int]] = {
    "unpadded": (make_pairs(target=logit_diff(3, 5)), 1),
    "left": (padded("left"), 1),
    "right": (padded("right"), 3),  # each row's last token stands at another position
    "in the middle": (make_pairs(target=log_prob(4, position=3)), 1),
    "continuation": (make_pairs(target=continuation([4, 6])), 2),
    "function": (make_pairs(target=last_logit_diff), 1),
}


def both(model: Any, run: Callable[[], Tensor], width: int) -> None:
    """What a run gives as it is, at most `width` positions of logits at a time, is what it gives with all logits."""
    seen = widths(model)
    few = run()
    assert seen and max(seen) <= width
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: None)]):
        everything = run()
    assert max(seen) > width
    torch.testing.assert_close(few, everything, atol=2e-6, rtol=1e-6, equal_nan=True)
    assert float(everything.detach().nan_to_num().std()) > 1e-3


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("family", BUILDERS)
def test_patching(family: str, pairs: str) -> None:
    given, width = PAIRS[pairs]
    model = BUILDERS[family]()
    both(model, lambda: activation_patching(model, given, ["resid_pre", "z"], direction="mean").effect, width)


@pytest.mark.parametrize("pairs", PAIRS)
def test_ablation_and_paths(pairs: str) -> None:
    given, width = PAIRS[pairs]
    model = models.build_gpt2()
    both(model, lambda: ablation(model, given, "z", value="mean").effect, width)
    both(model, lambda: path_patching(model, given, "heads", receivers=["q", "logits"]).effect, width)


@pytest.mark.parametrize("pairs", ["unpadded", "left", "right", "function"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("level", ["node", "edge"])
def test_circuits(level: Any, family: str, pairs: str) -> None:
    given = PAIRS[pairs][0]
    model = BUILDERS[family]()

    def evaluated() -> Tensor:
        evaluate = Ablation(model, given, level)
        kept = torch.rand(4, len(evaluate.items), generator=torch.Generator().manual_seed(0)) > 0.4
        return torch.cat([evaluate(kept), evaluate.full.unsqueeze(0)])

    both(model, evaluated, 1)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_removed_tokens(baseline: str, side: str) -> None:
    model, given = models.build_gpt2(), padded(side)
    rows = torch.tensor([0, 1, 2, 2])
    removed = torch.zeros(4, given.clean.shape[1], dtype=torch.bool)
    removed[:, 3:5] = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
    if baseline == "pad_token":
        model.tokenizer = type("Tokenizer", (), {"pad_token_id": 1})()

    def removal(target: Any) -> tuple[Tensor, Tensor]:
        made = TextRemoval(model, given.clean, given.clean_mask, target=target, baseline=baseline)
        parts = made.parts(rows, removed)
        values, answers = zip(*(made.run(rows[part], removed[part]) for part in parts), strict=True)
        return torch.cat(values), torch.cat(answers)

    both(model, lambda: removal(logit_diff(3, 5))[0], 1)
    if baseline != "delete":  # which takes targets at the last position alone
        both(model, lambda: removal(log_prob(5, position=2))[0], 1)
        both(model, lambda: removal(as_target(lambda logits: logits[:, -1, 3] - logits[:, -2].logsumexp(-1)))[0], 3)
    few = removal(logit_diff(3, 5))[1]
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: None)]):
        assert torch.equal(few, removal(logit_diff(3, 5))[1])


def test_occlusion() -> None:
    model, given = models.build_llama(), padded("left")
    both(model, lambda: occlusion()(model, given.clean, logit_diff(3, 5), given.clean_mask), 1)


def test_activations_need_no_logits() -> None:
    model, given = models.build_gpt2(), padded("left")
    name = "blocks.1.attn.hook_z"
    both(model, lambda: activations(model, given.clean, [name], pairs=given)[name], 1)


def test_an_unembedding_without_positions_is_refused() -> None:
    """Here 7 tokens are announced, and 6 are run."""
    model = models.build_gpt2()
    with pytest.raises(RelevanceError, match="did not get one vector per token"), logits_at(model, torch.tensor([[5]]), 7):
        model(models.random_tokens(1))


def test_a_classifier_has_one_position() -> None:
    model = build_classifier("bert_classifier")
    tokens = models.random_tokens(2)
    removed = torch.nn.functional.one_hot(torch.tensor([2, 3]), 6).bool()
    target = logit_diff(1, 0)
    removal = TextRemoval(model, tokens, torch.ones_like(tokens), target=target, baseline="zero_embedding")
    value, answer = removal.run(torch.arange(2), removed)
    with torch.no_grad(), model.hooks(fwd_hooks=[(removal._embedding, lambda x, hook: x * ~removed.unsqueeze(-1))]):
        logits = model(tokens)
    torch.testing.assert_close(value, (logits[:, 1] - logits[:, 0]).double())
    assert torch.equal(answer, logits.argmax(-1))
