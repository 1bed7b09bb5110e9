"""Prompts that begin alike: the same numbers as plain forwards on every family, padding, what is not shared, and how much is saved."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from analyses.benchmarks.tiny_models import build
from analyses.perturbation import BASELINES, TextRemoval, attribution, perturbation_curves
from analyses.perturbation.beginnings import can_share, end_logits
from analyses.perturbation.curves import curves_of
from lens_relevance import continuation, log_prob, logit, logit_diff
from lens_relevance.sites import anatomy
from tests import models

TARGET = logit_diff(7, 11)
SHARING = [
    "gpt2",
    "neox_parallel",
    "gptj",
    "opt",
    "bloom",
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "phi3",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
]


@pytest.mark.parametrize("family", SHARING)
def test_logits_of_shared_beginnings_are_those_of_plain_forwards(family: str) -> None:
    """In float64, rows of several lengths; mistral and gemma3 have windows of 4 tokens."""
    model = build(family, torch.float64)
    assert can_share(model)
    ids = torch.randint(0, models.VOCAB_SIZE, (12, 9), generator=torch.Generator().manual_seed(0))
    ids[:, :3], ids[6:, 3:6] = ids[0, :3], ids[6, 3:6]
    lengths, filled = torch.tensor([9] * 10 + [5, 7]), torch.zeros_like(ids).bool()
    filled[3, 4] = filled[7, 2] = True
    embedding, filler = anatomy(model).leaves[0], torch.linspace(-1, 1, model.W_E.shape[1], dtype=torch.float64)
    seen = []
    for rows, logits in end_logits(model, ids, lengths, filled=filled, filler=filler, embedding=embedding):
        for row, got in zip(rows.tolist(), logits, strict=True):
            gone = filled[row : row + 1, : lengths[row], None]
            hook = (embedding, lambda x, hook, gone=gone: torch.where(gone, filler.to(x), x))
            with torch.no_grad(), model.hooks(fwd_hooks=[hook]):
                want = model(ids[row : row + 1, : lengths[row]], return_type="logits", use_cache=False)[0, -1]
            torch.testing.assert_close(got[0], want, rtol=0, atol=1e-6 * float(want.std()))  # deepseek: float32 inside
            seen.append(row)
    assert sorted(seen) == list(range(12))


@pytest.mark.parametrize("family", ["mamba", "bert", "native", "t5"])
def test_models_without_such_a_cache_share_nothing(family: str) -> None:
    assert not can_share(build(family))


def plainly(removal: TextRemoval) -> TextRemoval:
    removal._shares = False
    return removal


@pytest.mark.parametrize("target", [TARGET, logit([7, 8, 9]), log_prob(5)], ids=["logit_diff", "logit", "log_prob"])
@pytest.mark.parametrize("baseline", [b for b in BASELINES if b != "pad_token"])
def test_removals_have_the_values_of_plain_forwards(baseline: str, target: object) -> None:
    model = models.build_llama(dtype=torch.float64)
    tokens, mask = models.random_tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, 5:] = 0  # padded on the right
    shared, plain = (TextRemoval(model, tokens, mask, target=target, baseline=baseline, seed=2, batch_size=7) for _ in range(2))  # type: ignore[arg-type]
    rows = torch.arange(3).repeat_interleave(10)
    removed = torch.rand(30, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    removed &= mask[rows].bool()
    removed[:, 0] = False
    (value, same), (wanted, also) = shared(rows, removed), plainly(plain)(rows, removed)
    assert shared._shares and shared._compared
    torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(same, also) and value.unique().numel() > 20


def test_what_is_read_elsewhere_or_padded_on_the_left_is_run_plainly() -> None:
    model, tokens = models.build_gpt2(), models.random_tokens(2, 7)
    left = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for target, mask in [
        (logit_diff(7, 11, position=2), torch.ones_like(tokens)),
        (continuation([7, 8]), torch.ones_like(tokens)),
        (TARGET, left),
    ]:
        removal = TextRemoval(model, tokens, mask, target=target, baseline="mean_embedding")
        rows, removed = torch.tensor([0, 1]), torch.nn.functional.one_hot(torch.tensor([4, 4]), 7).bool()
        wanted = plainly(TextRemoval(model, tokens, mask, target=target, baseline="mean_embedding"))(rows, removed)[0]
        assert torch.equal(removal(rows, removed)[0], wanted) and not removal._compared


def test_a_cache_that_does_not_fit_the_model_is_not_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here every beginning goes on from another than its own."""
    original = DynamicCache.batch_select_indices
    monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, which: original(self, which.flip(0)))
    model, tokens = models.build_gpt2(), models.random_tokens(1, 12)
    removal, plain = (TextRemoval(model, tokens, torch.ones_like(tokens), target=TARGET, baseline="delete") for _ in range(2))
    monkeypatch.setattr("analyses.perturbation.beginnings.CALL", 0)
    removed = torch.rand(60, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    removed[:, 0] = False
    rows = torch.zeros(60, dtype=torch.long)
    value, wanted = removal(rows, removed)[0], plainly(plain)(rows, removed)[0]
    assert not removal._shares
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_less_than_half_of_the_tokens_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """All orders of one prompt together; curves are those of plain forwards."""
    monkeypatch.setattr("analyses.perturbation.beginnings.CALL", 0)  # for a model whose calls cost nothing
    model, tokens = models.build_gpt2(dtype=torch.float64), models.random_tokens(1, 14)
    mask = torch.ones_like(tokens)
    scores = {str(seed): attribution("random")(model, tokens + seed, TARGET, mask) for seed in range(3)}
    forward, run = type(model).forward, []
    monkeypatch.setattr(type(model), "forward", lambda self, ids, *a, **k: run.append(ids.numel()) or forward(self, ids, *a, **k))
    curves = []
    for removal in (TextRemoval(model, tokens, mask, target=TARGET, baseline="zero_embedding") for _ in range(2)):
        run.clear()
        if curves:
            plainly(removal)
        curves.append((curves_of(scores, mask.cumsum(1) > 1, [removal]), sum(run)))
    (shared, few), (plain, many) = curves
    assert few < many / 2
    torch.testing.assert_close(torch.tensor(shared["value"].values), torch.tensor(plain["value"].values), rtol=1e-9, atol=1e-9)


def test_a_filler_of_token_ids_is_scaled_as_the_model_scales_it() -> None:
    """Gemma multiplies its embeddings by the root of their size: a random token is that token."""
    model, tokens = build("gemma3"), models.random_tokens(1)
    removal = TextRemoval(model, tokens, torch.ones_like(tokens), target=TARGET, baseline="random_tokens", seed=3)
    removed = torch.tensor([[False, False, True, False, True, False]])
    other = torch.where(removed, removal._other, tokens)  # type: ignore[arg-type]
    with torch.no_grad():
        logits = model(other, return_type="logits", use_cache=False)[0, -1]
    assert not torch.equal(other, tokens)
    assert removal(torch.tensor([0]), removed)[0].item() == pytest.approx(float(logits[7] - logits[11]), abs=1e-5)


def test_curves_leave_the_model_as_it_was() -> None:
    model, tokens = models.build_llama(), models.random_tokens(2)
    before = model(tokens, return_type="logits")
    perturbation_curves(model, tokens, TARGET, methods=["gradient"], baselines=["mean_embedding"])
    assert torch.equal(model(tokens, return_type="logits"), before)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
