"""What a metric reads, and metrics that read much or change their mind."""

from __future__ import annotations

import torch
import transformer_lens.patching as tl_patching
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import activation_patching
from analyses.patching.readout import Readout
from lens_relevance.inputs.targets import continuation
from tests.analyses.patching.helpers import make_pairs


def test_a_metric_of_several_positions(gpt2: TransformerBridge) -> None:
    """Positions before the patched one count too: their logits are those of the run without patches."""
    pairs = make_pairs()

    def losses(logits: Tensor) -> Tensor:
        return -logits[:, :-1].log_softmax(-1).gather(2, pairs.clean[:, 1:, None]).mean((1, 2))

    result = activation_patching(gpt2, pairs, "resid_pre", metric=losses)
    assert result.shortcut == "position"
    with torch.no_grad():
        _, clean = gpt2.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_resid_pre(gpt2, pairs.corrupt, clean, lambda logits: losses(logits).mean())
    torch.testing.assert_close(torch.tensor(result.grid("resid_pre", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)


def test_a_continuation(gpt2: TransformerBridge) -> None:
    """Its tokens are added to both prompts, and it reads several positions."""
    pairs = make_pairs(target=continuation([7, 9]))
    result = activation_patching(gpt2, pairs, "resid_pre")
    extended = torch.cat([pairs.corrupt, torch.full((3, 1), 7)], dim=1)
    with torch.no_grad():
        log_probs = gpt2(extended)[:, -2:].log_softmax(-1)
    torch.testing.assert_close(result.baseline, log_probs[:, 0, 7] + log_probs[:, 1, 9], atol=1e-5, rtol=0)
    assert {node.position for node in result.nodes} == set(range(7))


def test_only_the_logits_that_a_metric_reads_are_computed() -> None:
    logits = torch.randn(2, 5, 7)
    assert Readout(lambda x: x[:, -1, 0], logits).columns.tolist() == [4]
    assert Readout(lambda x: x[:, 1, 0] - x[:, 3].logsumexp(-1), logits).columns.tolist() == [1, 3]
    assert Readout(lambda x: x[torch.arange(2), torch.tensor([2, 4])].softmax(-1)[:, 0], logits).columns.tolist() == [2, 4]
    assert Readout(lambda x: (x.argmax(-1) == 3).float().mean(-1), logits).columns.tolist() == list(range(5))

    def hidden(x: Tensor) -> Tensor:  # no gradient comes from position 0, but it counts
        return x[:, -1, 0] + x[:, 0, 0].detach()

    readout = Readout(hidden, logits)
    assert readout.columns.tolist() == list(range(5))
    torch.testing.assert_close(readout(logits), hidden(logits))


def test_only_the_tokens_that_a_metric_reads_are_computed() -> None:
    logits = torch.randn(2, 5, 40)
    tokens = torch.tensor([[3, 30], [7, 30]])

    def difference(x: Tensor) -> Tensor:
        last = x[:, -1].gather(1, tokens)
        return last[:, 0] - last[:, 1]

    readout = Readout(difference, logits)
    assert readout.tokens is not None and readout.tokens.tolist() == [3, 7, 30] and readout.columns.tolist() == [4]
    torch.testing.assert_close(readout(logits[:, 4:, readout.tokens]), difference(logits))
    assert Readout(lambda x: x[:, -1].log_softmax(-1)[:, 3], logits).tokens is None
    assert Readout(lambda x: x[:, -1, :30].mean(-1), logits).tokens is None  # too many to be worth it
    assert Readout(lambda x: x[:, -1, 3] - x[:, -1].max(-1).values.detach(), logits).tokens is None  # no gradient, but they count


def test_a_metric_that_is_a_view_of_the_logits(gpt2: TransformerBridge) -> None:
    """Every run writes its logits to the same place."""
    pairs = make_pairs()
    view, copy = (activation_patching(gpt2, pairs, "z", metric=metric) for metric in (lambda x: x[:, -1, 3], lambda x: x[:, -1, 3] + 0))
    assert torch.equal(view.patched, copy.patched) and view.effect.abs().max() > 1e-3


def test_a_metric_that_looks_elsewhere_in_some_runs(gpt2: TransformerBridge) -> None:
    """Which token it reads depends on the logits, so that the run without patches does not tell."""
    pairs = make_pairs(1)
    plain = activation_patching(gpt2, pairs, "resid_pre", metric=lambda x: x[:, -1, 3])
    threshold = float(plain.baseline) - float((plain.baseline - plain.patched).max()) / 2

    def metric(x: Tensor) -> Tensor:
        return torch.where(x[:, -1, 3] > threshold, x[:, -1, 3], x[:, -1, 5])

    with torch.no_grad():
        _, clean = gpt2.run_with_cache(pairs.clean)
    expected = tl_patching.get_act_patch_resid_pre(gpt2, pairs.corrupt, clean, lambda logits: metric(logits).mean())
    found = activation_patching(gpt2, pairs, "resid_pre", metric=metric)
    assert not torch.allclose(found.patched, plain.patched)
    torch.testing.assert_close(torch.tensor(found.grid("resid_pre", "patched").to_numpy(dtype="float32")), expected, atol=1e-5, rtol=0)
