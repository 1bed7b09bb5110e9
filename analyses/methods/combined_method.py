"""`combined`: for each kind of component the point between tangent and secant that patching follows there, and what lies around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS
from analyses.methods.base import Bracket, Estimator, Scores, collect, points, turned
from analyses.methods.ruleset_method import warn_if_incomplete
from analyses.methods.second_order_method import RECOMPUTED, expansion
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceCache, propagate

SECANT_SHARE = {"resid": 1.0, "mlp": 1.0, "attn": 0.5, "heads": 0.625, "v": 0.75, "neurons": 0.25}
"""How far from tangent (0) to secant (1) the estimate of a kind lies; chosen as docs/measurements/reliability.md says."""

SECANT, DENOISING, NOISING = "secant", "tangent, corrupt run", "tangent, clean run"
SECOND_DENOISING, SECOND_NOISING = "second order, corrupt run", "second order, clean run"


def combined() -> Estimator:
    """The mean of both directions of patching, estimated for each kind of component by what is nearest to it (derived here).

    The secant is `deeplift`: it sees saturation, and shares interactions among all that change together. The tangents are attribution
    patching in either run: right for a component that acts through products with others, blind to saturation. Whole positions of the
    residual stream and MLP outputs follow the secant; attention outputs lie half-way, single heads and values nearer to the secant; a
    single neuron of many lies near the tangent. Queries and keys get the median of the secant, of the tangent behind their recomputed
    softmax (as in AtP*) and of its second order (`second_order`), the latter two in the mean of both runs; for these each layer takes two
    further backward passes.

    `bracket` gives the estimates it is made of, from which `analyses.evaluation.reliability` makes an interval.
    """

    def scores(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Scores:
        return centre(bracket(model, pairs, components))

    return Estimator("combined", scores, forwards=4, backwards=3, symmetric=True, bracket=bracket, centre=centre)


def centre(estimates: Bracket) -> Scores:
    """The score that the estimates of `bracket` lead to."""
    found: Scores = {}
    for name, secant in estimates[SECANT].items():
        tangent = (estimates[DENOISING][name] + estimates[NOISING][name]) / 2
        if name in RECOMPUTED:
            found[name] = (
                torch.stack([secant, tangent, (estimates[SECOND_DENOISING][name] + estimates[SECOND_NOISING][name]) / 2]).median(0).values
            )
            continue
        found[name] = tangent + SECANT_SHARE[name] * (secant - tangent)
    return found


def bracket(model: TransformerBridge, pairs: PromptPairs, components: Sequence[str]) -> Bracket:
    """Secant and tangents of each component; queries and keys have tangents behind their recomputed softmax, and second order."""
    plain = [name for name in components if name not in RECOMPUTED]
    found: Bracket = {SECANT: {}, DENOISING: {}, NOISING: {}}
    for estimate, at in estimates_at(model, pairs, points(model, components), points(model, plain)).items():
        found[estimate] = collect(model, components if estimate == SECANT else plain, at)
    for name in [name for name in components if name in RECOMPUTED]:
        for sign, direction, tangent, second in ((1, pairs, DENOISING, SECOND_DENOISING), (-1, turned(pairs), NOISING, SECOND_NOISING)):
            terms = expansion(model, direction, name)
            found[tangent][name] = sign * terms[0]
            found.setdefault(second, {})[name] = sign * (terms[0] + terms[1])
    return found


def estimates_at(
    model: TransformerBridge, pairs: PromptPairs, names: Sequence[str], plain: Sequence[str]
) -> dict[str, Callable[[str], Tensor]]:
    """Secant and tangents as functions that give the estimates, element by element, at a HookPoint.

    Args:
        names: HookPoints at which the secant is wanted.
        plain: those at which the tangents are; no run is made for none.
    """
    first = COMPONENTS["resid"].read_at(0)
    pair = propagate(
        model,
        pairs.corrupt,
        pairs.target,
        rules="deeplift",
        names_filter=list(dict.fromkeys([*names, first])),
        reference=pairs.clean,
        attention_mask=pairs.corrupt_mask,
    )
    warn_if_incomplete(pair, first)
    found: dict[str, Callable[[str], Tensor]] = {SECANT: lambda point: -pair[point]}
    for estimate, tokens, mask in ((DENOISING, pairs.corrupt, pairs.corrupt_mask), (NOISING, pairs.clean, pairs.clean_mask)):
        if plain:
            run = propagate(model, tokens, pairs.target, rules="gradient", names_filter=list(plain), attention_mask=mask)
            found[estimate] = partial(_tangent, pair, run)
    return found


def _tangent(pair: RelevanceCache, run: RelevanceCache, point: str) -> Tensor:
    """(a_clean - a_corrupt) * g, g the gradient in `run`."""
    name = pair.canonical(point)
    return (pair.reference_activations[name] - pair.activations[name]) * run.coefficients[run.canonical(point)]
