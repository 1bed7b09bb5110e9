"""KernelSHAP: Shapley values of tokens or patches, from a weighted regression on coalitions of those that are kept.

captum's KernelSHAP draws coalitions at random also where all could be run, and needs scikit-learn for its regression; this one runs all of
them where they are few, and its result is then exact.
"""

from __future__ import annotations

from math import comb

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.methods.base import Estimator
from analyses.methods.single_inputs import ROWS, SingleInput
from analyses.methods.tokens_only import tokens_only
from lens_relevance import RelevanceError
from lens_relevance.hooked_model import HookedModel


def kernel_shap(samples: int = 512, seed: int = 0) -> Estimator:
    """KernelSHAP (Lundberg and Lee 2017, arXiv 1705.07874): a token left out has the value of the reference (`mean_embedding()`).

    The scores add up to the difference of the target between the prompt and its reference. With up to log2(samples + 2) tokens that can be
    left out all coalitions are run, and the scores are Shapley values exactly; beyond, coalitions are drawn in pairs, each with its
    complement.

    Args:
        samples: coalitions, besides that of all and that of none, one forward each.
        seed: of the coalitions.

    Raises:
        RelevanceError: fewer than two samples.
    """
    if samples < 2:
        raise RelevanceError(f"samples must be at least 2, got {samples}")

    def scores(model: HookedModel, one: SingleInput) -> Float[Tensor, " item"]:
        players = one.replaceable.nonzero().flatten()
        result = one.values.new_zeros(one.n_items, dtype=torch.float64)
        if len(players) == 0:
            return result
        kept, weights = coalitions(len(players), samples, seed)
        everything = torch.cat([torch.zeros(1, len(players)), torch.ones(1, len(players)), kept.double()]).bool()
        present = torch.ones(len(everything), one.n_items, dtype=torch.bool, device=players.device)
        present[:, players] = everything.to(players.device)
        with torch.no_grad():
            values = torch.cat([one(torch.where(part[:, one.items[0]], one.values, one.baseline)) for part in present.split(ROWS)])
        result[players] = shapley_regression(kept, weights, values.double().cpu()).to(result)
        return result

    return tokens_only("kernel_shap", scores, forwards=samples + 2, backwards=0)


def coalitions(n: int, samples: int, seed: int) -> tuple[Bool[Tensor, "coalition player"], Float[Tensor, " coalition"]]:
    """Coalitions of some but not all of n players, and their weights in the regression."""
    if 2**n - 2 <= samples:
        numbers = torch.arange(1, 2**n - 1)
        kept = (numbers[:, None] >> torch.arange(n)) % 2 == 1
        weights = [(n - 1) / (comb(n, k) * k * (n - k)) for k in kept.sum(1).tolist()]
        return kept, torch.tensor(weights, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, n, dtype=torch.float64)
    drawn = torch.multinomial(1 / (sizes * (n - sizes)), samples // 2, replacement=True, generator=generator) + 1
    order = torch.rand(len(drawn), n, generator=generator).argsort(1)
    half = order < drawn[:, None]
    return torch.cat([half, ~half]), torch.ones(2 * len(half), dtype=torch.float64)


def shapley_regression(
    kept: Bool[Tensor, "coalition player"], weights: Float[Tensor, " coalition"], values: Float[Tensor, " coalitions_and_two"]
) -> Float[Tensor, " player"]:
    """phi that minimises sum of weight (value(S) - value(none) - sum over S of phi)^2, with sum of phi = value(all) - value(none).

    The last player's phi is put in by that equation.

    Args:
        values: of no player, of all, and of each coalition.
    """
    gap = values[1] - values[0]
    x = kept.double()
    left, right = x[:, :-1] - x[:, -1:], values[2:] - values[0] - x[:, -1] * gap
    root = weights.sqrt()
    first = torch.linalg.lstsq(left * root[:, None], right * root, driver="gelsd").solution
    return torch.cat([first, gap - first.sum(0, keepdim=True)])
