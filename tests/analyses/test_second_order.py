"""The second-order score against closed forms in fp64, and against plain patching where the target is a quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.methods import estimator
from analyses.methods.base import turned
from analyses.methods.combined_method import DENOISING, NOISING, SECANT, SECANT_SHARE, SECOND_DENOISING, SECOND_NOISING, bracket
from analyses.methods.second_order_method import expansion
from analyses.patching import activation_patching
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, latent, propagate
from lens_relevance.hooks.model_state import frozen
from tests import models
from tests.analyses.test_atp_star import attention
from tests.analyses.test_ranking import random_pairs

LAST = 1  # the last layer of the small models


def quadratic_pairs(model: TransformerBridge, n: int = 4) -> PromptPairs:
    """Pairs whose target is a quadratic form of the logits of each row."""
    generator = torch.Generator().manual_seed(5)
    form = torch.randn(models.VOCAB_SIZE, models.VOCAB_SIZE, generator=generator, dtype=torch.float64) / models.VOCAB_SIZE

    def quadratic(logits: Tensor) -> Tensor:
        last = logits[:, -1].double()
        return torch.einsum("bi,ij,bj->b", last, form, last) + 3 * last[:, 0]

    pairs = random_pairs(n)
    return PromptPairs(pairs.clean, pairs.corrupt, quadratic)


@pytest.fixture
def without_norms() -> TransformerBridge:
    """A model whose last layer writes to logits that are linear in the residual stream."""
    return models.build_native(dtype=torch.float64, normalization_type=None)


def test_it_is_patching_where_the_target_is_quadratic(without_norms: TransformerBridge) -> None:
    """MLP outputs of the last layer, at the last position alone: one component, and nothing but a quadratic form above it."""
    pairs = quadratic_pairs(without_norms)
    scores = estimator("second_order")(without_norms, pairs, ["mlp"])["mlp"][:, LAST, -1]
    gradient = estimator("gradient")(without_norms, pairs, ["mlp"])["mlp"][:, LAST, -1]
    patched = activation_patching(without_norms, pairs, [f"L{LAST}.mlp@{pairs.clean.shape[1] - 1}"], progress=False).effect[0]
    torch.testing.assert_close(scores, patched.to(scores), rtol=1e-9, atol=1e-9)
    assert ((gradient - scores).abs() > 1e-2 * scores.abs()).all()  # the second term counts


def test_the_second_term_is_that_of_a_hessian_written_out() -> None:
    """Per layer: half of d_i . sum_j H_ij d_j, with H from torch.autograd.functional on the changes of all heads of the layer."""
    model, pairs = models.build_gpt2(dtype=torch.float64), random_pairs(2)
    first, second = expansion(model, pairs, "heads")
    for layer in range(2):
        name = COMPONENTS["heads"].read_at(layer)
        values = []
        for tokens in (pairs.clean, pairs.corrupt):
            _, cache = model.run_with_cache(tokens, names_filter=[name])
            values.append(cache[name])
        change = values[0] - values[1]
        n_heads = change.shape[2]
        for row in range(2):
            pair = pairs[row]

            def of_shares(shares: Tensor, row: int = row, name: str = name, change: Tensor = change, pair: PromptPairs = pair) -> Tensor:
                def move(z: Tensor, hook: Any) -> Tensor:
                    return z + shares[None, None, :, None] * change[row : row + 1]

                with model.hooks(fwd_hooks=[(name, move)]):
                    return pair.metric(model)(model(pair.corrupt, return_type="logits")).sum()

            with frozen(model):
                hessian = torch.autograd.functional.hessian(of_shares, torch.zeros(n_heads, dtype=change.dtype))
                slope = torch.autograd.functional.jacobian(of_shares, torch.zeros(n_heads, dtype=change.dtype))
            torch.testing.assert_close(first[row, layer], slope, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(second[row, layer], hessian.sum(1) / 2, rtol=1e-8, atol=1e-10)
            assert hessian.abs().max() > 1e-4


def test_for_queries_and_keys_the_first_term_is_the_gradient_behind_the_recomputed_softmax() -> None:
    model, pairs = models.build_gpt2(torch.float64), random_pairs()
    (_, clean), (_, corrupt) = (model.run_with_cache(tokens) for tokens in (pairs.clean, pairs.corrupt))
    g = propagate(model, pairs.corrupt, pairs.target, rules="gradient", names_filter=lambda name: name.endswith("o.hook_in")).coefficients
    for name in ("q", "k"):
        first = expansion(model, pairs, name)[0]
        for layer in range(2):
            here, other = ({x: run[f"blocks.{layer}.attn.hook_{x}"] for x in "qkv"} for run in (corrupt, clean))
            change = attention(**{**here, name: other[name]}) - attention(**here)
            torch.testing.assert_close(first[:, layer], (change * g[f"blocks.{layer}.attn.o.hook_in"]).sum((1, 3)), rtol=1e-9, atol=1e-11)
        assert first.abs().max() > 1e-3


def test_clean_run_and_mean(gpt2: TransformerBridge) -> None:
    pairs, method = random_pairs(), estimator("second_order")
    here, there, mean = (method(gpt2, pairs, ["heads"], run=run)["heads"] for run in ("corrupt", "clean", "mean"))
    torch.testing.assert_close(mean, (here + there) / 2)
    assert (here - there).abs().max() > 1e-3 * mean.abs().max()


def test_combined_lies_where_its_table_says(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    found = estimator("combined")(gpt2, pairs, [*SECANT_SHARE, "q", "k"])
    parts = bracket(gpt2, pairs, list(found))
    for name, share in SECANT_SHARE.items():
        secant, here, there = (estimator(m)(gpt2, pairs, [name], run=r)[name] for m, r in _PARTS)
        torch.testing.assert_close(parts[SECANT][name], secant, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts[DENOISING][name], here, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts[NOISING][name], there, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found[name], share * secant + (1 - share) * (here + there) / 2, rtol=1e-3, atol=1e-5)
    for name in ("q", "k"):
        first = (expansion(gpt2, pairs, name)[0] - expansion(gpt2, turned(pairs), name)[0]) / 2
        second = estimator("second_order")(gpt2, pairs, [name], run="mean")[name]
        torch.testing.assert_close((parts[SECOND_DENOISING][name] + parts[SECOND_NOISING][name]) / 2, second, rtol=1e-4, atol=1e-6)
        between = torch.stack([parts[SECANT][name], first, second])
        assert (found[name] <= between.amax(0) + 1e-6).all() and (found[name] >= between.amin(0) - 1e-6).all()
        torch.testing.assert_close(found[name], between.median(0).values, rtol=1e-4, atol=1e-5)


_PARTS = (("deeplift", "corrupt"), ("gradient", "corrupt"), ("gradient", "clean"))


def test_a_latent_is_refused(gpt2: TransformerBridge) -> None:
    pairs = random_pairs()
    target = latent("blocks.1.mlp.hook_post", 3)
    with pytest.raises(RelevanceError, match="second_order explains functions of the logits"):
        estimator("second_order")(gpt2, PromptPairs(pairs.clean, pairs.corrupt, target), ["heads"])
