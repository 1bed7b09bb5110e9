"""AtMan: what the target loses when the attention to one token is suppressed in every layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.methods.base import Estimator
from analyses.methods.single_inputs import ROWS, Hooks, SingleInput
from analyses.methods.tokens_only import tokens_only
from lens_relevance import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.rules.softmax import is_masked
from lens_relevance.sites import Anatomy, anatomy


def atman(suppression: float = 0.9) -> Estimator:
    """AtMan (Deiseroth et al. 2023, arXiv 2301.08110): the fall of the target when a token's attention scores are times 1 - suppression.

    Scores are those before the softmax, of all queries, heads and layers. For the target `log_prob` this is the paper's rise of the loss.
    Where Hugging Face runs the attention as a whole (BERT, T5, ViT), the token's keys are times 1 - suppression, which does the same to
    their product with the queries. The paper also suppresses tokens with like embeddings together, for pictures above all; here each is
    suppressed alone. Patches of pictures and tokens alike; one forward for each.

    Raises:
        RelevanceError: suppression is not above 0 and at most 1.
    """
    if not 0 < suppression <= 1:
        raise RelevanceError(f"suppression is a share above 0 and at most 1, got {suppression}")

    def scores(model: HookedModel, one: SingleInput) -> Float[Tensor, " item"]:
        body, items = anatomy(model), one.real.nonzero().flatten()
        values = []
        with torch.no_grad():
            whole = one(one.values)
            for some in items.split(ROWS):
                copies = one.values.expand(len(some), *one.values.shape[1:])
                values.append(one.target(copies, _suppressing(body, one, some, 1 - suppression)))
        result = one.values.new_zeros(one.n_items, dtype=whole.dtype)
        result[items] = whole - torch.cat(values)
        return result

    return tokens_only("atman", scores, forwards=1, backwards=0, per_token=1)


def _suppressing(body: Anatomy, one: SingleInput, items: Tensor, factor: float) -> Hooks:
    """Hooks by which row i of a forward pays less attention to item i; patches are the last positions of their token set."""
    read = [attention.pattern for attention in body.attentions if attention.sources == one.stack]
    found = {str(site.output.name): site for site in body.sites if site.kind == "pattern" and site.output is not None}
    before = {str(site.output.name): site for site in body.sites if site.kind == "scores" and site.output is not None}
    hooks: list[Any] = []
    for name in read:
        site = found.get(body.canonical(name))
        scores = None if site is None else before.get(str(site.inputs[0].name))
        if scores is None:
            raise RelevanceError(f"it is not known how the scores of {name} come about, so that AtMan cannot suppress any")

        def of_scores(x: Tensor, hook: Any) -> Tensor:
            return torch.where(is_masked(x), x, x * _factors(x, x.shape[-1], one, items, factor)[:, None, None])

        def of_keys(x: Tensor, hook: Any) -> Tensor:
            return x * _factors(x, x.shape[1], one, items, factor).reshape(len(x), -1, *[1] * (x.ndim - 2))

        hooks.append((str(scores.inputs[1].name), of_keys) if scores.rebuilt is not None else (str(scores.output_name), of_scores))
    return hooks


def _factors(like: Tensor, n: int, one: SingleInput, items: Tensor, factor: float) -> Float[Tensor, "row key"]:
    """1, and `factor` at the position of each row's item."""
    result = like.new_ones(len(items), n)
    result[torch.arange(len(items)), items + (n - one.n_items)] = factor
    return result
