"""CD-T: contextual decomposition for transformers (Hsu et al. 2024, arXiv 2407.00886), of the tokens of single prompts.

Every activation is split into what comes from one token (beta) and the rest (gamma), which add up to it:

| step | beta at its output |
|---|---|
| linear | W beta, and of the bias the part abs(W beta) / (abs(W beta) + abs(W gamma)) |
| norm | beta centred, over the whole's standard deviation, times the weight; of the bias the part abs(beta) / (abs(beta) + abs(gamma)) |
| activation | f(beta + gamma) - f(gamma) |
| attention | the pattern of beta + gamma times the beta of the values |
| residual connection | the sum of the betas |

These are the steps of the authors' code for the tokens of a prompt; the correction of opposite signs that some versions of it make after
each step is left out. What tokens do together in an activation belongs to each of them, so the scores do not add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.methods.base import Estimator
from analyses.methods.single_inputs import Hooks, SingleInput
from analyses.methods.tokens_only import tokens_only
from lens_relevance import CoverageError, RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.model_state import no_gradients
from lens_relevance.rules import Activation, Linear, Mix, Norm
from lens_relevance.sites import Anatomy, Site, anatomy
from lens_relevance.sites.token_sets import TOKENS

_OF_THE_PATTERN = ("scores", "pattern")


def cd_t() -> Estimator:
    """Contextual decomposition of the target into tokens, each against all others; one forward for each token.

    For logits and their differences, on models with one stack of blocks and ungated MLPs (GPT-2, NeoX, OPT, BERT, ViT): the paper has no
    step for gates. A token is what enters the first block at its position.

    Source: CD-T (Hsu et al. 2024, arXiv 2407.00886), as its code does it for the tokens of a prompt.

    Raises:
        RelevanceError: another kind of target.
        CoverageError: a model with several stacks, or an operation without a step.
    """

    def scores(model: HookedModel, one: SingleInput) -> Float[Tensor, " item"]:
        if getattr(one.explained, "kind", None) not in ("logit", "logit_diff"):
            raise RelevanceError("cd_t splits logits: explain logit(...) or logit_diff(...)")
        body = anatomy(model)
        if set(body.stacks.roles) != {TOKENS}:
            raise CoverageError("cd_t knows models with one stack of blocks; choose 'attnlrp' or 'integrated_gradients'")
        with no_gradients():
            whole = _whole_run(body, one)
            items = one.real.nonzero().flatten()
            values = [one.target(one.values.expand(1, *one.values.shape[1:]), _of_token(body, whole, one, int(i))) for i in items]
        result = one.values.new_zeros(one.n_items)
        result[items] = torch.cat(values).to(result)
        return result

    return tokens_only("cd_t", scores, forwards=1, backwards=0, per_token=1)


def _steps(body: Anatomy) -> list[Site]:
    """The sites from the first block on, in no order, each with a rule above.

    Raises:
        CoverageError: the model has steps of another kind.
    """
    found = []
    for site in body.sites:
        if site.kind in _OF_THE_PATTERN or site.name.startswith("embed") or site.mount in ("q_norm", "k_norm"):
            continue
        if isinstance(site.operation, Norm | Linear | Activation | Mix) and site.output is not None:
            found.append(site)
        elif site.kind not in ("norm", "linear") or site.output is None:  # the steps of a norm stand beside the whole of it
            raise CoverageError(f"cd_t has no step for {site.name} ({site.kind}); choose 'attnlrp' or 'integrated_gradients'")
    return found


def _whole_run(body: Anatomy, one: SingleInput) -> dict[str, Tensor]:
    """What passes the HookPoints of the sites in the run as it is, and each attention's pattern by the name of its z."""
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x.detach().clone()

    scores = {str(site.output_name): site for site in body.sites if site.kind == "scores"}
    patterns = {str(site.output_name): site for site in body.sites if site.kind == "pattern"}
    sites = [*_steps(body), *scores.values(), *patterns.values()]
    names = {str(point.name) for site in sites for point in (*site.inputs, site.output) if point is not None}
    names.add(body.stacks.roles[TOKENS]["residual"][0])
    handles = [
        site.caller.register_forward_pre_hook(_listening(site), with_kwargs=True) for site in scores.values() if site.caller is not None
    ]
    try:
        one.target(one.values, [(name, keep) for name in sorted(names)])
    finally:
        for handle in handles:
            handle.remove()
    for site in _steps(body):
        if isinstance(site.operation, Mix):
            pattern = patterns[str(site.inputs[0].name)]
            of_scores = scores[str(pattern.inputs[0].name)]
            if of_scores.rebuilt is not None:  # what the model shows there is not what it goes on with
                given = [_raw(kept[str(point.name)]) for point in of_scores.inputs]
                kept[str(pattern.output_name)] = pattern.operation(of_scores.operation(*given))
    return kept


def _listening(site: Site) -> Any:
    assert site.on_call is not None
    on_call = site.on_call
    return lambda module, args, kwargs: on_call(args, kwargs)


def _of_token(body: Anatomy, whole: Mapping[str, Tensor], one: SingleInput, item: int) -> Hooks:
    """Hooks that make of a forward one of a token's betas: each step's output is that of its rule."""
    start, betas = body.stacks.roles[TOKENS]["residual"][0], dict[str, Tensor]()
    hooks: list[Any] = []

    def begin(x: Tensor, hook: Any) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        own = positions == item + x.shape[1] - one.n_items  # patches are the last positions
        return torch.where(own.unsqueeze(-1), whole[start], torch.zeros_like(x))

    def keep(x: Tensor, hook: Any) -> None:
        betas[hook.name] = x

    def step(site: Site) -> Any:
        def run(x: Tensor, hook: Any) -> Tensor:
            name = str(site.inputs[-1].name)
            if isinstance(site.operation, Mix):
                pattern = whole[str(site.inputs[0].name)]
                return site.operation(pattern, _raw(betas[name])).reshape(x.shape)
            return beta_after(site.operation, betas[name], whole[name]).reshape(x.shape)

        return run

    sites = _steps(body)
    hooks += [(start, begin)]
    hooks += [(str(site.output_name), step(site)) for site in sites]
    hooks += [(name, keep) for name in dict.fromkeys(str(site.inputs[-1].name) for site in sites)]
    return hooks


def beta_after(operation: Any, beta: Tensor, whole: Tensor) -> Tensor:
    """The beta of an operation's output, for the beta and the whole of its input."""
    gamma = whole - beta
    if isinstance(operation, Activation):
        return operation(whole) - operation(gamma)
    if isinstance(operation, Linear):
        beta, gamma = (_by_features(x, operation.weight.shape[1]) for x in (beta, gamma))
        one, other = operation.apply(beta, operation.weight), operation.apply(gamma, operation.weight)
        return one if operation.bias is None else one + operation.bias * _part(one, other)
    assert isinstance(operation, Norm)
    passed = operation.weighted(operation.centre(beta) / operation.scale(whole))
    return passed if operation.bias is None else passed + operation.bias.detach() * _part(beta, gamma)


def _part(one: Tensor, other: Tensor) -> Tensor:
    """The share of the first in the sum of both sizes, 0 where both are 0."""
    total = one.abs() + other.abs()
    return torch.where(total == 0, torch.zeros_like(total), one.abs() / torch.where(total == 0, torch.ones_like(total), total))


def _raw(x: Tensor) -> Tensor:
    """A tensor without its heads apart, where TransformerLens shows them as [batch, pos, head, d_head]."""
    return x.flatten(2) if x.ndim == 4 else x


def _by_features(x: Tensor, n: int) -> Tensor:
    return x if x.shape[-1] == n else x.flatten(2)
