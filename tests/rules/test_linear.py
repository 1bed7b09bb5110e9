"""Linear layers keep their bias and nothing else."""

from __future__ import annotations

import torch

from lens_relevance.rules import Linear, Rule, ZeroRule
from tests.rules.dense import near, normal, sink

X1, X2, G, W, B = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2), normal(2, 3, 5, seed=3), normal(5, 4, seed=4), normal(5, seed=5)


def test_the_bias_keeps_its_share() -> None:
    operation = Linear(W, B)
    near(operation(X1), torch.einsum("oi,bpi->bpo", W, X1) + B)
    left = ((operation(X1) * G).sum((1, 2))) - (X1 * torch.einsum("oi,bpo->bpi", W, G)).sum((1, 2))
    near(sink(ZeroRule(), operation, (X1,), G), left)
    near(left, (B * G).sum((1, 2)))
    assert ZeroRule().is_plain and Rule().is_plain


def test_between_two_runs_nothing_is_kept() -> None:
    operation = Linear(W, B)
    assert sink(ZeroRule(), operation, (X1,), G, (X2,)).tolist() == [0, 0]
    near(((operation(X1) - operation(X2)) * G).sum((1, 2)), ((X1 - X2) * (G @ W)).sum((1, 2)))


def test_without_bias_nothing_is_kept() -> None:
    assert sink(ZeroRule(), Linear(W, None), (X1,), G).tolist() == [0, 0]
