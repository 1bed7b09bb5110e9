"""All methods by name, and the function that runs one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from lens_relevance.attention_methods import (
    attention_flow,
    chefer_2021a,
    chefer_2021b,
    globenc,
    gradient_attention,
    legrad,
    raw_attention,
    rollout,
    weighted_accumulation,
)
from lens_relevance.attention_methods.accumulation import Accumulation
from lens_relevance.attention_methods.additions import FromOne, normalised_additions
from lens_relevance.attention_methods.result import TokenRelevance, TokenSetsRelevance
from lens_relevance.attention_methods.run import AttentionRun, check_patterns, read_masks, run_points, token_sets
from lens_relevance.attention_methods.two_sets import check_groups
from lens_relevance.cache import RelevanceCache
from lens_relevance.engine import propagate
from lens_relevance.errors import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.model_state import check_model, left_as_found
from lens_relevance.inputs.prompt import Inputs
from lens_relevance.inputs.targets import AnyTarget, as_target
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset, ruleset_name
from lens_relevance.sites import Anatomy, anatomy


def _nothing_more(body: Anatomy, importance: str) -> list[str]:
    return []


@dataclass(frozen=True)
class Method:
    """accumulate: from a run to relevance. points: HookPoints it needs besides the patterns. two_gradients: it wants the plain one too.

    one_set: why it is not defined for two token sets, where it is not.
    """

    accumulate: Callable[[AttentionRun], Accumulation]
    points: Callable[[Anatomy, str], list[str]] = _nothing_more
    two_gradients: bool = False
    rules: str = "gradient"
    one_set: str = ""


METHODS: dict[str, Method] = {
    "weighted_accumulation": Method(weighted_accumulation.accumulate, weighted_accumulation.points),
    "chefer_2021b": Method(chefer_2021b.accumulate),
    "chefer_2021a": Method(chefer_2021a.accumulate, two_gradients=True, rules="lrp_zplus"),
    "rollout": Method(rollout.accumulate),
    "attention_flow": Method(attention_flow.accumulate),
    "globenc": Method(globenc.accumulate, globenc.points, one_set="its decomposition is that of one residual stream"),
    "legrad": Method(legrad.accumulate),
    "gradient_attention": Method(gradient_attention.accumulate),
    "raw_attention": Method(raw_attention.accumulate),
}
ALIASES = {"chefer": "chefer_2021b"}


@left_as_found
def token_relevance(
    model: HookedModel,
    inputs: Inputs | Mapping[str, Any],
    target: AnyTarget | None = None,
    *,
    method: str = "weighted_accumulation",
    importance: str = "relevance",
    rules: str | Table | None = None,
    attention_mask: Shaped[Tensor, "batch token"] | Mapping[str, Shaped[Tensor, "batch _token"]] | None = None,
) -> TokenRelevance | TokenSetsRelevance:
    """Relevance of tokens for tokens from attention patterns and their gradients, in one forward and one backward pass (chefer_2021a: two).

    | method | source |
    |---|---|
    | `weighted_accumulation` | our reading of Huang et al. 2023 (arXiv 2308.10240), read from its abstract alone; the weights are ours |
    | `chefer_2021b` (or `chefer`) | Chefer et al. 2021, ICCV (arXiv 2103.15679) |
    | `chefer_2021a` | Chefer et al. 2021, CVPR (arXiv 2012.09838) |
    | `rollout` | Abnar and Zuidema 2020 (arXiv 2005.00928) |
    | `attention_flow` | Abnar and Zuidema 2020 (arXiv 2005.00928) |
    | `globenc` | Modarressi et al. 2022 (arXiv 2205.03286) |
    | `legrad` | Bousselham et al. 2024 (arXiv 2404.03214) |
    | `gradient_attention` | gradient x input, taken at the patterns |
    | `raw_attention` | the last pattern itself |

    These are scores of a single run: they say along which attention the target's relevance came, mostly without a sign, and do not add up
    to the target. For a pair of prompts `propagate(..., rules="deeplift", reference=...)` explains the difference of the two targets,
    signed and adding up exactly.

    Args:
        model: A TransformerBridge in eval mode with live patterns, or a model whose sites and attentions are declared.
        inputs: As for `propagate`. A model with two token sets (encoder and decoder, or declared ones) takes a dict of its keyword
            arguments.
        target: As for `propagate`; the row that is explained is that of the position that the target reads.
        method: One of the table.
        importance: For weighted accumulation: `relevance`, `norm`, `grad_norm`, or `equal`, which is `chefer_2021b`.
        rules: Ruleset under which the backward pass delivers gradients (any that needs no reference run). None: that of the method's
            paper, `gradient`, and `lrp_zplus` for `chefer_2021a`, with the paper's normalised sums and its start at 1.
        attention_mask: 1 where a token is real; of a model with two token sets one by name, {"encoder": mask}.

    Returns:
        The scores; a TokenSetsRelevance for a model with two token sets.

    Raises:
        RelevanceError: An unknown method, importance or ruleset, or bad inputs.
        CoverageError: A model without live patterns.
    """
    chosen = METHODS.get(ALIASES.get(method, method))
    if chosen is None:
        raise RelevanceError(f"unknown method {method!r}; choose one of {', '.join([*METHODS, *ALIASES])}")
    if importance not in weighted_accumulation.IMPORTANCES:
        raise RelevanceError(f"unknown importance {importance!r}; choose one of {', '.join(weighted_accumulation.IMPORTANCES)}")
    rules = chosen.rules if rules is None else rules
    table = ruleset(rules)
    if needs_reference(table):
        raise RelevanceError(
            f"ruleset {ruleset_name(rules)!r} compares two runs and token relevance explains one; choose a ruleset for single runs, such "
            "as 'gradient' or 'attnlrp', or propagate(..., reference=...).tokens()"
        )
    check_model(model)
    body = anatomy(model)
    check_patterns(body, model)
    check_groups(body.attentions)
    sets = token_sets(body)
    if len(sets) == 1 and isinstance(inputs, Mapping) and len(inputs) > 1:
        raise RelevanceError(
            f"inputs name two token sets ({', '.join(map(str, inputs))}), but this model has one and no cross-attention; give one prompt"
        )
    if len(sets) == 2 and chosen.one_set:
        raise RelevanceError(f"{method!r} is not defined for two token sets ({' and '.join(sets)}): {chosen.one_set}")
    names = list(dict.fromkeys([*run_points(body), *chosen.points(body, importance)]))
    mask = None if isinstance(attention_mask, Mapping) else attention_mask
    device = next(model.parameters()).device  # a model spread over several leaves its layers' tensors on each

    def run_under(table: str | Table, asked: Any) -> RelevanceCache:
        return propagate(model, inputs, asked, rules=table, names_filter=names, attention_mask=mask, device=device)

    plain = cache = run_under("gradient" if chosen.two_gradients else rules, target)
    if chosen.two_gradients and ruleset_name(rules) == "lrp_zplus":
        with normalised_additions(model, body):
            cache = run_under(rules, FromOne(None if target is None else as_target(target)))
    elif chosen.two_gradients and ruleset_name(rules) != "gradient":
        cache = run_under(rules, target)
    known = dict(zip(sets, cache.masks.values(), strict=False)) if len(sets) == 1 else cache.masks  # none for an image
    masks = read_masks(body, cache, {**known, **(attention_mask if isinstance(attention_mask, Mapping) else {})})
    run = AttentionRun(body, cache, importance, plain, masks)
    common = (ALIASES.get(method, method), importance, ruleset_name(rules), plain.value)
    if len(sets) == 1:
        # an image has no ids: its tokens are counted
        ids = cache.input_tokens if cache.masks else torch.arange(run.mask.shape[1]).expand_as(run.mask)
        tokenizer = cache.tokenizer if cache.masks else None
        return TokenRelevance(*common, run.start, ids, run.mask, chosen.accumulate(run), tokenizer)
    explained = {name: run.start[:, run.span(name)] for name in sets}
    return TokenSetsRelevance(*common, explained, masks, tuple(one.pattern for one in body.attentions), chosen.accumulate(run))
