"""How relevance is split among three factors: the example of the derivation, and the Shapley split of queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from analyses.benchmarks.bracketing import expert_splits, gate_split, moved, shares
from analyses.benchmarks.tiny_models import build
from analyses.methods import estimator
from analyses.methods.deeplift_shapley_method import shapley
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, logit_diff, propagate
from lens_relevance.rules import Experts, GatedActivation
from lens_relevance.sites import anatomy
from tests.precision import no_upcasts

CLEAN = torch.tensor([[1, 7, 9, 30, 12, 4], [2, 5, 40, 8, 8, 3]])
CORRUPT = torch.tensor([[1, 22, 9, 31, 12, 6], [2, 5, 17, 8, 44, 3]])
PAIRS = PromptPairs(CLEAN, CORRUPT, logit_diff(3, 4))


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    with no_upcasts():
        yield


def by_orders(value: Any, factors: int = 3) -> list[Tensor]:
    """Shapley values by their definition: the mean over all orders in which factors change from the reference to the explained run."""
    shares, orders = [torch.tensor(0.0, dtype=torch.float64)] * factors, list(permutations(range(factors)))
    for order in orders:
        runs = [1] * factors
        for factor in order:
            before = value(*runs)
            runs[factor] = 0
            shares[factor] = shares[factor] + (value(*runs) - before) / len(orders)
    return shares


def test_the_example_of_the_derivation() -> None:
    x, y = ((2.0, 3.0, 4.0), (1.0, 1.0, 2.0))
    first, last = (6.0, 9.0, 7.0), (7.0, 9.0, 6.0)  # (x1 x2) x3 and x1 (x2 x3)
    a, b, c = zip(x, y, strict=True)

    def two(one: Any, other: Any) -> tuple[float, float]:
        return (one[0] - one[1]) * sum(other) / 2, (other[0] - other[1]) * sum(one) / 2

    whole, to_c = two([a[0] * b[0], a[1] * b[1]], c)
    to_a, to_b = (part * whole / (a[0] * b[0] - a[1] * b[1]) for part in two(a, b))
    assert (to_a, to_b, to_c) == first
    to_a, whole = two(a, [b[0] * c[0], b[1] * c[1]])
    to_b, to_c = (part * whole / (b[0] * c[0] - b[1] * c[1]) for part in two(b, c))
    assert (to_a, to_b, to_c) == last
    values = {runs: torch.tensor((x, y)[runs[0]][0] * (x, y)[runs[1]][1] * (x, y)[runs[2]][2]) for runs in product((0, 1), repeat=3)}
    found = [float(v) for v in shapley(values)]
    assert sum(found) == pytest.approx(22) and found == pytest.approx([float(v) for v in by_orders(lambda *runs: values[runs])])
    split = [tuple(torch.tensor(float(v)) for v in shares) for shares in (first, last)]
    assert moved(*split) == pytest.approx(1 / 22)
    with pytest.raises(AssertionError):
        moved(split[0], tuple(2 * v for v in split[1]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bloom"])
def test_queries_keys_and_values_get_their_shapley_values(family: str) -> None:
    """Against all orders of exchanging q, k and v in the model itself, layer by layer, with the coefficient at the head's output held."""
    model = build(family)
    found = estimator("deeplift_shapley")(model, PAIRS, ["q", "k", "v"])
    runs = [model.run_with_cache(tokens)[1] for tokens in (CORRUPT, CLEAN)]
    cache = propagate(
        model, CORRUPT, PAIRS.target, rules="deeplift", reference=CLEAN, names_filter=[f"blocks.{i}.attn.hook_z" for i in (0, 1)]
    )
    shown = ["hook_rot_q", "hook_rot_k", "hook_v"] if "blocks.0.attn.hook_rot_q" in runs[0] else ["hook_q", "hook_k", "hook_v"]
    for layer in range(2):
        at = f"blocks.{layer}.attn."

        def value(*chosen: int, at: str = at) -> Tensor:
            kept: list[Tensor] = []
            hooks = [(at + name, lambda x, hook, run=run: runs[run][hook.name]) for name, run in zip(shown, chosen, strict=True)]
            with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, (at + "hook_z", lambda x, hook: kept.append(x.clone()))]):
                model(CORRUPT)
            z, g = kept[0], cache.coefficients[cache.canonical(at + "hook_z")]
            return (z * g.reshape(z.shape)).sum((1, 3))

        expected = by_orders(value)
        for name, share in zip("qkv", expected, strict=True):
            got = found[name][:, layer]
            wanted = -share.reshape(2, got.shape[1], -1).sum(2)
            assert float(wanted.abs().max()) > 1e-6
            torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_they_add_up_to_those_of_deeplift(family: str) -> None:
    model = build(family)
    symmetric, plain = (estimator(name)(model, PAIRS, ["q", "k", "v"]) for name in ("deeplift_shapley", "deeplift"))
    sums = [{name: scores[name].sum(2) for name in "qkv"} for scores in (symmetric, plain)]
    torch.testing.assert_close(sum(sums[0].values()), sum(sums[1].values()), atol=1e-9, rtol=1e-9)
    assert max(float((sums[0][name] - sums[1][name]).abs().max()) for name in "qkv") > 1e-5  # and are another split


def test_other_components_are_refused() -> None:
    with pytest.raises(RelevanceError, match="scores q, k, v, not heads"):
        estimator("deeplift_shapley")(build("gpt2"), PAIRS, ["heads"])


def test_the_splits_that_are_compared_are_those_of_deeplift() -> None:
    """Gate and up against the relevance at their HookPoints; an expert's factors against all of what its output carries."""
    llama = build("llama")
    cache = propagate(llama, CORRUPT, PAIRS.target, rules="deeplift", reference=CLEAN, names_filter=lambda _: True)
    for site in anatomy(llama).sites:
        if isinstance(site.operation, GatedActivation):
            ours, other = gate_split(site, cache)
            for point, share in zip(site.inputs, ours, strict=True):
                torch.testing.assert_close(share, cache[str(point.name)])
            assert 0 < moved(ours, other) < 0.5
    mixtral = build("mixtral")
    cache = propagate(mixtral, CORRUPT, PAIRS.target, rules="deeplift", reference=CLEAN, names_filter=lambda _: True)
    sites = [site for site in anatomy(mixtral).sites if isinstance(site.operation, Experts)]
    assert len(sites) == 2
    for site in sites:
        carried = sum(float(part.sum()) for ours, _ in expert_splits(site, cache) for part in ours)
        assert carried == pytest.approx(float(cache[site.output_name].sum()), rel=1e-6)


def test_every_chain_of_a_model_is_measured() -> None:
    assert set(shares(build("mixtral"), CORRUPT, CLEAN, PAIRS.target)["chain"]) == {"attention", "expert"}
    assert set(shares(build("llama"), CORRUPT, CLEAN, PAIRS.target)["chain"]) == {"attention", "gate"}
