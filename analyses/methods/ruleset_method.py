"""Every ruleset as an attribution method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.edges import EdgeAttribution, attribute_edges
from analyses.methods.base import Estimator, Scores, collect, points
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, mean_embedding, propagate
from lens_relevance.hooked_model import HookedModel
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset, ruleset_name
from lens_relevance.sites import anatomy


def by_ruleset(rules: str | Table, name: str | None = None) -> Estimator:
    """(a_clean - a_corrupt) * g under a ruleset; `gradient` is attribution patching (Nanda 2023), and EAP on edges (Syed et al. 2023).

    Tokens of single prompts: relevance at their embeddings; a pair ruleset compares with `mean_embedding()` unless told otherwise.

    Args:
        name: what it is called in tables; the ruleset's name by default.
    """
    pair = needs_reference(ruleset(rules))
    complete = isinstance(rules, str) and rules == "deeplift"

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        names, first = points(model, components), COMPONENTS["resid"].read_at(0)
        cache = propagate(
            model,
            pairs.corrupt,
            pairs.target,
            rules=rules,
            names_filter=list(dict.fromkeys([*names, first])) if complete else names,
            reference=pairs.clean,
            attention_mask=pairs.corrupt_mask,
        )
        if complete:
            warn_if_incomplete(cache, first)
        return collect(model, components, lambda point: -cache[point])  # the clean run less the corrupt one, where g is taken

    def edges(model: TransformerBridge, pairs: PromptPairs) -> EdgeAttribution:
        corrupt = attribute_edges(model, pairs.corrupt, pairs.target, rules=rules, reference=pairs.clean, attention_mask=pairs.corrupt_mask)
        return replace(
            corrupt, scores=-corrupt.scores, writer_scores=-corrupt.writer_scores, reader_scores=-corrupt.reader_scores
        )  # clean less corrupt

    def tokens(
        model: HookedModel,
        inputs: Any,
        target: Any,
        *,
        attention_mask: Tensor | None = None,
        reference: Any = None,
        stack: str | None = None,
    ) -> Tensor:
        if pair and reference is None:
            reference = mean_embedding()
        names = list(anatomy(model).leaves)
        cache = propagate(
            model, inputs, target, rules=rules, names_filter=names, reference=reference if pair else None, attention_mask=attention_mask
        )
        return cache.tokens(stack)

    return Estimator(name or ruleset_name(rules), scores, forwards=2, backwards=1, symmetric=pair, edges=edges, tokens=tokens)


_COMPLETENESS = 1e-3


def warn_if_incomplete(cache: RelevanceCache, first: str) -> None:
    """Say so where relevance does not add up to the difference of the target, as that of `deeplift` does in every sound run without jumps.

    Args:
        first: HookPoint of the residual stream that enters the first block.
    """
    assert cache.reference_value is not None
    gaps, relevance = (cache.value - cache.reference_value).double(), cache[first].double().flatten(1)
    errors, gap = [float((relevance.sum(1).to(gaps) - gaps).abs().mean())], float(gaps.abs().mean())
    if bool((gaps == gaps[0]).all()):  # of one number for all rows, the rows together give it
        errors.append(float((relevance.sum().to(gaps) - gaps[0]).abs()))
    error, precision = min(errors), torch.finfo(cache.activations[cache.canonical(first)].dtype).eps
    if error > max(_COMPLETENESS, 16 * precision) * gap and error > 100 * precision * float(relevance.abs().sum(1).mean()):
        warnings.warn(
            f"deeplift's relevance misses the difference of the target between the two runs ({gap:.3g} on average) by {error:.3g}, which "
            "in a sound run without jumps it cannot: does a mixture of experts choose others in the other run, is the target a function "
            "with jumps, or did something change the model or the runs in between? propagate(..., audit=True).conservation() says where "
            "it stays",
            stacklevel=2,
        )
