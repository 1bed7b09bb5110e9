"""Padding, targets and batches change nothing."""

from __future__ import annotations

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.patching import activation_patching
from analyses.tasks import PromptPairs
from lens_relevance.inputs.targets import logit_diff
from tests.analyses.patching.helpers import FAMILIES, last_logit_diff, make_pairs, padded


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "neox_parallel", "llama", "native"])
def test_padded_rows_equal_the_rows_alone(name: str, side: str) -> None:
    model, pairs = FAMILIES[name][0](), padded(side)
    components = ["resid_pre", "mlp_out", "z"]
    result = activation_patching(model, pairs, components)
    together = result.to_dataframe(per_pair=True)
    assert result.shortcut == FAMILIES[name][1]
    for row in range(3):
        real = pairs.clean_mask[row].bool()
        alone = activation_patching(
            model, PromptPairs(pairs.clean[row : row + 1, real], pairs.corrupt[row : row + 1, real], pairs.target), components
        )
        found = together[together["pair"] == row]
        offset = int(real.nonzero()[0])
        inside = found["position"].isna() | (found["position"] - offset).between(0, int(real.sum()) - 1)
        assert found.loc[~inside, "patched"].isna().all() and (row == 0 or (~inside).any())
        expected = alone.to_dataframe()
        torch.testing.assert_close(
            torch.tensor(found.loc[inside, "patched"].to_numpy()), torch.tensor(expected["patched"].to_numpy()), atol=2e-5, rtol=0
        )
        assert expected["effect"].abs().max() > 1e-3


def test_the_mean_is_over_pairs_that_have_the_token(gpt2: TransformerBridge) -> None:
    result = activation_patching(gpt2, padded("left"), "resid_pre")
    frame = result.to_dataframe().set_index(["layer", "position"])
    assert frame.loc[(0, 0), "patched"] == pytest.approx(float(result.patched[0, 0]))
    assert frame.loc[(1, 3), "effect"] == pytest.approx(float(result.effect[7 + 3].mean()), abs=1e-6)
    assert (frame["effect"] - (frame["patched"] - frame["baseline"])).abs().max() < 1e-6


def test_targets_callables_and_scalars_agree(gpt2: TransformerBridge) -> None:
    answers, wrong = torch.tensor([3, 8, 1]), torch.tensor([5, 2, 9])
    rows = torch.arange(3)
    by_target = activation_patching(gpt2, make_pairs(target=logit_diff(answers, wrong)), "z")
    by_callable = activation_patching(gpt2, make_pairs(), "z", metric=lambda logits: logits[rows, -1, answers] - logits[rows, -1, wrong])
    torch.testing.assert_close(by_target.patched, by_callable.patched, atol=1e-6, rtol=0)
    by_scalar = activation_patching(
        gpt2, make_pairs(), "z", metric=lambda logits: (logits[rows, -1, answers] - logits[rows, -1, wrong]).mean()
    )
    torch.testing.assert_close(by_scalar.patched[:, 0], by_target.patched.mean(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
@pytest.mark.parametrize("name", ["gpt2", "native"])
def test_the_batch_size_does_not_matter(name: str, batch_size: int) -> None:
    """With one answer per row, pairs are split as well as patches; a callable gets its rows together."""
    model = FAMILIES[name][0]()
    pairs = make_pairs(2, 4, (1, 2))
    for metric in (logit_diff(torch.tensor([3, 8]), torch.tensor([5, 2])), last_logit_diff):
        whole = activation_patching(model, pairs, ["attn_out", "z"], metric=metric, direction="mean")
        split = activation_patching(model, pairs, ["attn_out", "z"], metric=metric, direction="mean", batch_size=batch_size)
        torch.testing.assert_close(split.effect, whole.effect, atol=1e-5, rtol=0)
        assert split.nodes == whole.nodes
