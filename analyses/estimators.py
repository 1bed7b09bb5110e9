"""Estimates of activation patching: what every component would do if it were patched, from a few backward passes, behind one signature.

The estimate of a component is sum of (a_clean - a_corrupt) * g, g the coefficient that a method delivers at its activation a:

| method | g | passes per pair |
|---|---|---|
| a ruleset | the coefficient under it; `gradient` is attribution patching (Nanda 2023; Syed et al. 2023) | 2 forwards, 1 backward |
| `eap_ig` | gradient averaged over embeddings between corrupt and clean (EAP-IG-inputs, Hanna et al. 2024) | steps + 2, steps |
| `conductance` | integrated gradients of hidden units: g and the change of a, step by step (Dhamdhere et al. 2018) | steps + 3, steps + 1 |
| `direct_logit_attribution` | gradient at the final residual, norm held constant: what is written straight to the logits | 3, 1 |
| `weighted_accumulation`, ... | heads only, no pair: what token-to-token relevance passes through a head of the clean prompt | 1, 1 |

Positive: the component carries what makes the metric of the clean run larger. `run` chooses where g is taken: on the corrupt run (as
TransformerLens does; estimates denoising), on the clean run (estimates noising), or the mean of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, propagate
from lens_relevance.attention_methods import METHODS as ATTENTION_METHODS
from lens_relevance.attention_methods import token_relevance
from lens_relevance.rules import LNRule
from lens_relevance.rulesets import Table, needs_reference, ruleset, rulesets

Component = Literal["resid", "attn", "mlp", "heads", "neurons"]
Run = Literal["corrupt", "clean", "both"]
Scores = dict[str, Float[Tensor, "batch layer index"]]
"""Per component: [batch, layer, position] for resid, attn, mlp; [batch, layer, head] and [batch, layer, neuron], summed over positions."""

POINTS: dict[str, str] = {
    "resid": "hook_resid_pre",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "heads": "attn.hook_z",
    "neurons": "mlp.hook_post",
}
"""HookPoint, within a block, at which each component is scored."""

_EMBEDDINGS = "embed.hook_out"
DEFAULT_STEPS = 20


@dataclass(frozen=True)
class Estimator:
    """A method that scores components for pairs.

    forwards, backwards: passes over each pair for one run. `both` takes them twice, unless the method is symmetric in the two runs.
    components: what it scores. single_run: it knows no counterpart and looks at the clean prompts alone, so `run` does not matter.
    """

    name: str
    one_run: Callable[[Any, PromptPairs, Sequence[Component]], Scores]
    forwards: int
    backwards: int
    symmetric: bool = False
    components: tuple[Component, ...] = ("resid", "attn", "mlp", "heads", "neurons")
    single_run: bool = False

    def passes(self, run: Run) -> int:
        """How often the runs are taken: 1, or 2 where both directions are averaged."""
        return 2 if run == "both" and not (self.symmetric or self.single_run) else 1

    def __call__(self, model: Any, pairs: PromptPairs, components: Sequence[Component], run: Run = "corrupt") -> Scores:
        """Scores of each component for each pair, in the units of the target.

        Raises RelevanceError for an unknown component or run, and what `propagate` raises.
        """
        for component in components:
            if component not in POINTS:
                raise RelevanceError(f"unknown component {component!r}; there are {', '.join(POINTS)}")
            if component not in self.components:
                raise RelevanceError(f"{self.name} scores {', '.join(self.components)}, not {component}; for these choose a ruleset")
        if run not in ("corrupt", "clean", "both"):
            raise RelevanceError(f"run is 'corrupt', 'clean' or 'both', not {run!r}")
        if run == "corrupt" or self.single_run or (run == "both" and self.symmetric):
            return self.one_run(model, pairs, components)
        # The clean run is the corrupt run of the pair turned round, and its scores are then those of corrupt against clean.
        other = self.one_run(model, _turned(pairs), components)
        clean = {name: -scores for name, scores in other.items()}
        if run == "clean":
            return clean
        corrupt = self.one_run(model, pairs, components)
        return {name: (corrupt[name] + clean[name]) / 2 for name in corrupt}


def estimator(method: str | Estimator) -> Estimator:
    """A method by name: a ruleset (`deeplift`, `relp`, `attnlrp`, `gradient`, ...) or one of `SPECIAL`; an Estimator is taken as it is."""
    if isinstance(method, Estimator):
        return method
    if method in SPECIAL:
        return SPECIAL[method]()
    if method in rulesets():
        return by_ruleset(method)
    raise RelevanceError(f"unknown method {method!r}; choose one of {', '.join([*rulesets(), *SPECIAL])}")


def by_ruleset(rules: str | Table, name: str | None = None) -> Estimator:
    """(a_clean - a_corrupt) * g under a ruleset: denoising is -propagate(corrupt, reference=clean)."""

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        cache = propagate(
            model,
            pairs.corrupt,
            pairs.target,
            rules,
            names_filter=points(model, components),
            reference=pairs.clean,
            attention_mask=pairs.corrupt_mask,
        )
        return collect(model, components, lambda point: -cache[point])

    symmetric = needs_reference(ruleset(rules))
    return Estimator(name or (rules if isinstance(rules, str) else "custom"), scores, forwards=2, backwards=1, symmetric=symmetric)


def eap_ig(steps: int = DEFAULT_STEPS) -> Estimator:
    """EAP-IG-inputs (Hanna, Pezzelle, Belinkov 2024): g averaged over the embeddings e_corrupt + k/m (e_clean - e_corrupt), k = 1 to m."""
    _check_steps(steps)

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        names = points(model, components)
        clean, corrupt = _activations(model, pairs.clean, names, pairs), _activations(model, pairs.corrupt, names, pairs)
        total: dict[str, Tensor] = {}
        for k in range(1, steps + 1):
            step = _between(model, pairs, names, clean[_EMBEDDINGS] - corrupt[_EMBEDDINGS], k / steps)
            for name in names:
                total[name] = total.get(name, 0) + step[name][1]
        return collect(model, components, lambda point: (clean[point] - corrupt[point]) * total[point] / steps)

    return Estimator(f"eap_ig ({steps} steps)", scores, forwards=steps + 2, backwards=steps)


def conductance(steps: int = DEFAULT_STEPS) -> Estimator:
    """Integrated gradients carried to hidden units (conductance, Dhamdhere et al. 2018), by the trapezoid rule over `steps` intervals.

    Sum over k of (a_k+1 - a_k) * mean(g_k, g_k+1) along the straight path between the embeddings: complete at every cut as steps grow.
    """
    _check_steps(steps)

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        names = points(model, components)
        ends = [_activations(model, tokens, [_EMBEDDINGS], pairs)[_EMBEDDINGS] for tokens in (pairs.clean, pairs.corrupt)]
        total: dict[str, Tensor] = {}
        last = _between(model, pairs, names, ends[0] - ends[1], 0.0)
        for k in range(1, steps + 1):
            here = _between(model, pairs, names, ends[0] - ends[1], k / steps)
            for name in names:
                (a, g), (b, h) = last[name], here[name]
                total[name] = total.get(name, 0) + (b - a) * (g + h) / 2
            last = here
        return collect(model, components, lambda point: total[point])

    return Estimator(f"conductance ({steps} steps)", scores, forwards=steps + 3, backwards=steps + 1)


def direct_logit_attribution() -> Estimator:
    """What each component writes straight into the target, past all later layers (the logit-lens view; nostalgebraist 2020).

    (a_clean - a_corrupt) . g_final at the component's own position, g_final the gradient at the final residual with the norm's scale held
    constant. Components that act through later ones get next to nothing: that is the point of showing it beside the others.
    """

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        final = f"blocks.{len(model.blocks) - 1}.hook_resid_post"
        cache = propagate(model, pairs.corrupt, pairs.target, {"norm": LNRule()}, names_filter=final, attention_mask=pairs.corrupt_mask)
        g, names = cache.coefficients[cache.canonical(final)], points(model, components)
        clean, corrupt = _activations(model, pairs.clean, names, pairs), _activations(model, pairs.corrupt, names, pairs)

        def written(point: str) -> Tensor:
            change = clean[point] - corrupt[point]
            here = g.to(change)  # layers may be on several devices
            if change.ndim == 3:
                return change * here
            block = model.blocks[int(point.split(".")[1])]
            if hasattr(block, "ln1_post"):
                raise RelevanceError("this model normalises what its heads write (ln1_post): choose a ruleset to score its heads")
            return change * torch.einsum("bpm,hdm->bphd", here, block.attn.W_O.detach().to(here))

        return collect(model, components, written)

    return Estimator("direct_logit_attribution", scores, forwards=3, backwards=1, components=("resid", "attn", "mlp", "heads"))


def by_attention(method: str) -> Estimator:
    """Heads by token-to-token relevance (`lens_relevance.attention_methods`): the part of the explained token's scores that passes a head.

    These methods see the clean prompt alone and mostly have no sign: they can find the heads that matter, but not which way they push.
    """

    def scores(model: Any, pairs: PromptPairs, components: Sequence[Component]) -> Scores:
        found = token_relevance(model, pairs.clean, pairs.target, method, attention_mask=pairs.clean_mask)
        return {"heads": found.heads} if components else {}

    return Estimator(method, scores, forwards=1, backwards=1, components=("heads",), single_run=True)


SPECIAL: dict[str, Callable[[], Estimator]] = {
    "eap_ig": eap_ig,
    "conductance": conductance,
    "direct_logit_attribution": direct_logit_attribution,
    **{name: partial(by_attention, name) for name in ATTENTION_METHODS},
}
"""Methods that are more than a ruleset, with their default number of steps."""


def points(model: Any, components: Sequence[Component]) -> list[str]:
    """The HookPoints of the components, in TransformerLens's short names."""
    return [f"blocks.{layer}.{POINTS[component]}" for component in components for layer in range(len(model.blocks))]


def collect(model: Any, components: Sequence[Component], relevance: Callable[[str], Tensor]) -> Scores:
    """Relevance by HookPoint as scores by component."""
    scores: Scores = {}
    for component in components:
        layers = [_reduced(component, relevance(f"blocks.{layer}.{POINTS[component]}")) for layer in range(len(model.blocks))]
        scores[component] = torch.stack([layer.to(layers[0].device) for layer in layers], dim=1)  # they may be on several devices
    return scores


def _reduced(component: Component, relevance: Tensor) -> Float[Tensor, "batch index"]:
    if component == "heads":
        return relevance.sum((1, 3))
    return relevance.sum(1) if component == "neurons" else relevance.sum(2)


def _turned(pairs: PromptPairs) -> PromptPairs:
    return PromptPairs(pairs.corrupt, pairs.clean, pairs.target, pairs.corrupt_mask, pairs.clean_mask)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise RelevanceError(f"integrated gradients need at least one step, not {steps}")


@torch.no_grad()
def _activations(model: Any, tokens: Int[Tensor, "batch pos"], names: Sequence[str], pairs: PromptPairs) -> dict[str, Tensor]:
    """Activations of one plain run, with those of the embeddings."""
    hidden = {} if bool((pairs.corrupt_mask == 1).all()) else {"attention_mask": pairs.corrupt_mask}
    _, cache = model.run_with_cache(tokens, names_filter=[*names, _EMBEDDINGS], **hidden)
    return {name: cache[name] for name in [*names, _EMBEDDINGS]}


def _between(
    model: Any, pairs: PromptPairs, names: Sequence[str], change: Float[Tensor, "batch pos d_model"], share: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation and gradient at each name, the corrupt embeddings moved by a share of `change`."""
    with model.hooks(fwd_hooks=[(_EMBEDDINGS, lambda embeddings, hook: embeddings + share * change)]):
        cache = propagate(model, pairs.corrupt, pairs.target, "gradient", names_filter=names, attention_mask=pairs.corrupt_mask)
    return {name: (cache.activations[cache.canonical(name)], cache.coefficients[cache.canonical(name)]) for name in names}
