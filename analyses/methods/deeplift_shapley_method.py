"""Queries, keys and values of a head under `deeplift`, with the Shapley split of what the three do together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.methods.base import Estimator, Scores
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, propagate
from lens_relevance.cache import RelevanceCache
from lens_relevance.rules import Scores as AttentionScores
from lens_relevance.rules.base import working
from lens_relevance.sites import Site, anatomy

COMPONENTS = ("q", "k", "v")
Split = tuple[Tensor, ...]
"""Relevance of each of several factors."""


def deeplift_shapley() -> Estimator:
    """`deeplift` for queries, keys and values, with their Shapley values at each head's output (derived here, docs/derivation.md).

    softmax(q k) v is a chain of three factors. `deeplift` splits it as pattern times v, then the pattern into q and k; where a pattern is
    saturated in both runs, that can give the keys next to nothing although a change of the keys alone changes the pattern. Here the output
    of each head, times the coefficient that `deeplift` has there, is computed for all eight choices of q, k and v from the two runs. The
    scores of a head's q, k and v add up to those of `deeplift`. Under grouped-query attention a key's or value's score is the sum over its
    group of query heads.

    Raises:
        RelevanceError: when it is used on a model that rotates queries and keys after their HookPoints, or that has no attention.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        layers = attention_sites(model)
        names = [str(point.name) for sites in layers for site in sites for point in (*site.inputs[:2], site.output) if point is not None]
        cache = propagate(
            model,
            pairs.corrupt,
            pairs.target,
            rules="deeplift",
            names_filter=list(dict.fromkeys(names)),
            reference=pairs.clean,
            attention_mask=pairs.corrupt_mask,
        )
        by_layer = [attention_split(*sites, cache=cache)[1] for sites in layers]
        # clean less corrupt, as all methods have it
        return {name: -torch.stack([split[COMPONENTS.index(name)] for split in by_layer], dim=1) for name in components}

    return Estimator("deeplift_shapley", scores, forwards=2, backwards=1, symmetric=True, components=COMPONENTS)


def attention_sites(model: TransformerBridge) -> list[tuple[Site, Site, Site]]:
    """Scores, pattern and z of every layer."""
    sites = {site.name: site for site in anatomy(model).sites}
    names = [site.name.removesuffix(":scores") for site in sites.values() if isinstance(site.operation, AttentionScores)]
    if not names:
        raise RelevanceError("this model has no attention whose queries, keys and values are known")
    return [(sites[f"{name}:scores"], sites[f"{name}:pattern"], sites[f"{name}:z"]) for name in names]


def attention_split(scores: Site, pattern: Site, mix: Site, *, cache: RelevanceCache) -> tuple[Split, Split]:
    """Relevance of one layer's queries, keys and values, [batch, head] each: that of `deeplift`, and the Shapley values."""
    op = scores.operation
    assert isinstance(op, AttentionScores)
    geometry = op.geometry
    if geometry.rotate is not None:
        raise RelevanceError(f"{scores.name}: queries and keys are rotated after their HookPoints, which this method does not follow")
    names = (str(scores.inputs[0].name), str(scores.inputs[1].name), str(mix.inputs[1].name))
    heads = (geometry.n_heads, geometry.n_key_value_heads, geometry.n_key_value_heads)
    q, k, v = ([_by_head(x, n) for x in both_runs(cache, name)] for name, n in zip(names, heads, strict=True))
    upstream = geometry.split_z(cache.coefficients[mix.output_name].flatten(2))

    def capped(i: int, j: int) -> Float[Tensor, "batch head query key"]:
        raw = q[i] @ geometry.expand(k[j]).transpose(-1, -2) * geometry.scale
        return raw if geometry.soft_cap is None else geometry.soft_cap * torch.tanh(raw / geometry.soft_cap)

    seen = working(cache.activations[scores.output_name])
    masked = seen <= torch.finfo(cache.activations[scores.output_name].dtype).min / 2
    added = (seen - capped(0, 0)).masked_fill(masked, float("-inf"))  # a position bias, and the mask

    def value(i: int, j: int, m: int) -> Float[Tensor, "batch head"]:
        return (pattern.operation(capped(i, j) + added) @ geometry.expand(v[m]) * upstream).sum((2, 3))

    found = shapley({runs: value(*runs) for runs in product((0, 1), repeat=3)})
    ours = tuple(_by_head(cache[name], n).sum((2, 3)) for name, n in zip(names, heads, strict=True))
    return ours, (found[0], *(x.unflatten(1, (-1, geometry.group)).sum(2) for x in found[1:]))


def shapley(values: Mapping[tuple[int, ...], Tensor]) -> Split:
    """Shapley values of three factors (Shapley 1953); values: by the run that each factor is taken from (0: explained, 1: reference)."""
    shares = []
    for factor in range(3):
        total = torch.zeros_like(next(iter(values.values())))
        for others in product((0, 1), repeat=2):
            weight = 1 / 6 if sum(others) == 1 else 1 / 3
            explained, reference = ((*others[:factor], run, *others[factor:]) for run in (0, 1))
            total = total + weight * (values[explained] - values[reference])
        shares.append(total)
    return tuple(shares)


def both_runs(cache: RelevanceCache, name: str) -> tuple[Tensor, Tensor]:
    """An activation in the run that is explained and in the reference run."""
    return working(cache.activations[name]), working(cache.reference_activations[name])


def _by_head(x: Tensor, n_heads: int) -> Float[Tensor, "batch head pos d_head"]:
    return x.reshape(*x.shape[:2], n_heads, -1).transpose(1, 2)
