"""What a run is compared with: which tokens a baseline replaces, with what, and what stays.

Completeness holds whatever the reference is, so that none of this shows in an account.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import VOCABULARY, build
from lens_relevance import RelevanceError, continuation, logit_diff, mean_embedding, propagate, random_tokens, zero_embedding
from lens_relevance.inputs.prompt import Prompt
from tests import models

TARGET = logit_diff(7, 11)
EMBEDDING = "embed.hook_out"
ANSWER = [3, 9, 4]
BOS, CLS, SEP = 20, 21, 22


def with_tokenizer(model: TransformerBridge, ordinary: int = VOCABULARY) -> TransformerBridge:
    """What references ask a tokenizer for; ids from `ordinary` on are special, and so are BOS, CLS and SEP."""
    special = [BOS, CLS, SEP, *range(ordinary, VOCABULARY)]
    roles = dict(bos_token_id=BOS, cls_token_id=CLS, sep_token_id=SEP, all_special_ids=special)
    model.tokenizer = SimpleNamespace(decode=str, **roles)
    return model


def embeddings_of_every_token(model: TransformerBridge) -> Tensor:
    """As the model itself computes them, [vocab, d_model]."""
    seen: list[Tensor] = []
    with torch.no_grad(), model.hooks(fwd_hooks=[(EMBEDDING, lambda x, hook: seen.append(x[0]))]):
        for ids in torch.arange(VOCABULARY).split(25):
            model(ids.unsqueeze(0))
    return torch.cat(seen)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "gemma2", "gemma3"])
def test_the_mean_embedding_is_that_of_what_the_model_computes(family: str) -> None:
    """Gemma scales its embeddings, by 4 here."""
    model, tokens = build(family), models.random_tokens()
    expected = embeddings_of_every_token(model).mean(0)
    cache = propagate(model, tokens, TARGET, reference=mean_embedding(), names_filter=EMBEDDING)
    torch.testing.assert_close(cache.reference_activations[EMBEDDING], expected.expand(*tokens.shape, -1), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(expected, embeddings_of_every_token(model)[0])


def test_the_zero_embedding_is_zero() -> None:
    cache = propagate(build("gpt2"), models.random_tokens(), TARGET, reference=zero_embedding(), names_filter=EMBEDDING)
    assert not cache.reference_activations[EMBEDDING].any() and cache.activations[EMBEDDING].all()


def padded() -> tuple[Tensor, Tensor]:
    """Rows of four, six and five tokens."""
    tokens, mask = models.random_tokens(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:] = mask[2, 5:] = 0
    return tokens, mask


def test_random_tokens_of_padded_rows_are_drawn_for_each_row_and_leave_padding_alone() -> None:
    model, (tokens, mask), n = build("gpt2"), padded(), 4
    run = random_tokens(n, seed=5).run(model, Prompt(tokens, mask))
    drawn, real = run.prompt.tokens.unflatten(0, (3, n)), mask.bool()
    assert run.n == n and torch.equal(run.prompt.mask, mask.repeat_interleave(n, 0))
    for row in range(3):
        assert torch.equal(drawn[row][:, ~real[row]], tokens[row, ~real[row]].expand(n, -1))
        assert len(drawn[row].unique(dim=0)) == n
    references = drawn[..., :4].flatten(0, 1)  # where every row is real
    assert len(references.unique(dim=0)) == 3 * n
    assert (drawn != tokens.unsqueeze(1))[real.unsqueeze(1).expand(-1, n, -1)].double().mean() > 0.9
    again, other = (random_tokens(n, seed=seed).run(model, Prompt(tokens, mask)).prompt.tokens for seed in (5, 6))
    assert torch.equal(again, run.prompt.tokens) and not torch.equal(other, again)


def test_relevance_against_random_tokens_on_padded_rows_is_the_mean_of_single_runs() -> None:
    model, (tokens, mask), n = build("gpt2", torch.float32), padded(), 3
    cache = propagate(model, tokens, TARGET, reference=random_tokens(n, seed=5), attention_mask=mask)
    drawn = random_tokens(n, seed=5).run(model, Prompt(tokens, mask)).prompt.tokens.unflatten(0, (3, n))
    for row, real in enumerate(mask.bool()):
        alone = [propagate(model, tokens[row : row + 1, real], TARGET, reference=one[real].unsqueeze(0)) for one in drawn[row]]
        expected = torch.stack([one.tokens()[0] for one in alone]).mean(0)
        torch.testing.assert_close(cache.tokens()[row, real], expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(cache.reference_value[row], torch.stack([one.reference_value[0] for one in alone]).mean())


@pytest.mark.parametrize("baseline", [mean_embedding(), random_tokens(3), zero_embedding()], ids=["mean", "random", "zero"])
def test_baselines_leave_a_continuation_in_place(baseline: object) -> None:
    """The last token of the answer is not fed; the two before it are, and stay; all of the prompt is replaced."""
    model, (tokens, mask) = build("gpt2"), padded()
    cache = propagate(model, tokens, continuation(ANSWER), reference=baseline, attention_mask=mask, names_filter=EMBEDDING)
    assert cache.input_tokens.shape == (3, 8)
    for row, length in enumerate(mask.sum(1).tolist()):
        assert cache.input_tokens[row, length : length + 2].tolist() == ANSWER[:2]
        moved = cache.tokens()[row] != 0
        assert moved.tolist() == [True] * length + [False] * (8 - length)


def test_a_continuation_follows_a_reference_of_other_tokens() -> None:
    model, tokens, other = build("gpt2"), models.random_tokens(), models.random_tokens(seed=1)
    cache = propagate(model, tokens, continuation(ANSWER), reference=other)
    for given, value in ((tokens, cache.value), (other, cache.reference_value)):
        whole = torch.cat([given, torch.tensor(ANSWER[:2]).expand(2, -1)], 1)
        log_probs = model(whole).log_softmax(-1)
        expected = sum(log_probs[:, 5 + i, token] for i, token in enumerate(ANSWER))
        torch.testing.assert_close(value, expected.detach())


@pytest.mark.parametrize("baseline", ["mean", "random", "vector"])
def test_what_begins_or_frames_a_text_stays(baseline: str) -> None:
    """BOS only where it begins a row (after padding, too), CLS and SEP wherever they stand."""
    model = with_tokenizer(build("gpt2", torch.float32))
    tokens = torch.tensor([[BOS, 5, BOS, 6, 7], [8, BOS, 5, 6, 9], [CLS, 5, 6, SEP, 7], [5, 6, SEP, 8, 9]])
    mask = torch.ones_like(tokens)
    mask[1, 0] = 0
    stays = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    reference = {"mean": mean_embedding(), "random": random_tokens(1, seed=2), "vector": torch.full((16,), 0.1) * torch.arange(16)}[
        baseline
    ]
    cache = propagate(model, tokens, TARGET, reference=reference, attention_mask=mask, names_filter=EMBEDDING)
    same = (cache.activations[EMBEDDING] == cache.reference_activations[EMBEDDING]).all(-1)
    assert torch.equal(same, stays)


def test_special_tokens_are_not_drawn() -> None:
    model = with_tokenizer(build("gpt2"), ordinary=12)
    drawn = random_tokens(50).run(model, Prompt(models.random_tokens(), torch.ones(2, 6, dtype=torch.long))).prompt.tokens
    assert set(drawn.unique().tolist()) == set(range(12))


def test_no_reference_is_none() -> None:
    with pytest.raises(RelevanceError, match="at least one reference, got n=0"):
        random_tokens(0)
