"""What an attribution method is: an Estimator, with its scores of components, of edges and of a prompt's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.components import COMPONENTS, SCORED, Run, resolve_component, resolve_run
from analyses.edges import EdgeAttribution
from analyses.models.structure import n_layers
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError
from lens_relevance.hooked_model import HookedModel
from lens_relevance.logit_reading import without_logits

Scores = dict[str, Float[Tensor, "batch layer index"]]
"""Per component: [batch, layer, position] for resid, attn, mlp; [batch, layer, head] and [batch, layer, neuron], summed over positions."""

Estimates = Float[Tensor, "batch estimate layer index"]
Bracket = dict[str, Scores]
"""Several estimates of the same scores, by the name of the estimate."""


@runtime_checkable
class TokenScores(Protocol):
    """Scores of the tokens of prompts (or of the patches of pictures), [batch, pos]."""

    def __call__(
        self,
        model: HookedModel,
        inputs: Any,
        target: Any,
        *,
        attention_mask: Shaped[Tensor, "batch pos"] | None = None,
        reference: Any = None,
        stack: str | None = None,
    ) -> Float[Tensor, "batch pos"]:
        """Scores of each row for the target.

        Args:
            inputs, target, attention_mask: as for `propagate`.
            reference: what a method that compares two runs is to compare with; None for its own choice.
            stack: the token set that is wanted, where a model has several.
        """


@dataclass(frozen=True)
class Estimator:
    """An attribution method: it estimates what patching a component would do, from a few passes over each pair.

    Attributes:
        name: what it is called in tables.
        one_run: (model, pairs, components) -> scores of clean against corrupt, with coefficients taken on the corrupt run. Components come
            by their names, not their aliases.
        forwards, backwards: passes over each pair for one run. The mean of both runs takes them twice, unless the method is symmetric.
        symmetric: whether both runs give the same.
        components: what it scores.
        single_run: whether it looks at the clean prompts alone, so that `run` does not matter.
        edges: (model, pairs) -> edges of clean against corrupt, with coefficients taken on the corrupt run; None where it has none.
        tokens: scores of the tokens of single prompts; None where it needs a pair.
        bracket: (model, pairs, components) -> estimates of patching, by name, between which the patched value is to be expected; None where
            the method knows one estimate alone. See `analyses.evaluation.reliability`.
        centre: what `one_run` makes of the estimates of `bracket`.
        per_layer: forward and backward passes that it takes besides, for each layer of the model.
        per_token: forward passes that it takes besides, for each token.
    """

    name: str
    one_run: Callable[[Any, PromptPairs, Sequence[str]], Scores]
    forwards: int
    backwards: int
    symmetric: bool = False
    components: tuple[str, ...] = SCORED
    single_run: bool = False
    edges: Callable[[Any, PromptPairs], EdgeAttribution] | None = None
    tokens: TokenScores | None = None
    bracket: Callable[[Any, PromptPairs, Sequence[str]], Bracket] | None = None
    centre: Callable[[Bracket], Scores] | None = None
    per_layer: int = 0
    per_token: int = 0

    def passes(self, run: Run) -> int:
        """How often the runs are taken: 1, or 2 where both directions are averaged."""
        return 2 if resolve_run(run) == "mean" and not (self.symmetric or self.single_run) else 1

    def token_passes(self, n_tokens: int) -> tuple[int, int]:
        """Forward and backward passes over a single prompt of so many tokens, for their scores.

        Raises:
            RelevanceError: it scores no tokens of single prompts.
        """
        if self.tokens is None:
            raise RelevanceError(f"{self.name} scores no tokens of single prompts")
        runs = self.forwards if self.single_run or self.symmetric else 1  # the other run of a pair is left out
        return runs + self.per_token * n_tokens, self.backwards

    def parts(self, pairs: PromptPairs, run: Run) -> list[tuple[float, PromptPairs]]:
        """Pairs to evaluate on their corrupt run, with the weights by which their scores add up to those of `run`.

        The clean run is the corrupt run of the pair turned round, and its scores are then those of corrupt against clean.
        """
        where = resolve_run(run)
        if where == "corrupt" or self.single_run or (where == "mean" and self.symmetric):
            return [(1.0, pairs)]
        return [(-1.0, turned(pairs))] if where == "clean" else [(0.5, pairs), (-0.5, turned(pairs))]

    def __call__(self, model: TransformerBridge, pairs: PromptPairs, components: Sequence[str], *, run: Run = "corrupt") -> Scores:
        """Scores of each component for each pair, in the units of the target, by the components' names (not their aliases).

        Raises:
            RelevanceError: an unknown component or run, a component that this method does not score, and what `propagate` raises.
        """
        names = [resolve_component(name).name for name in components]
        for name in names:
            if not self.components:
                raise RelevanceError(f"{self.name} scores the tokens of single prompts, not {name}; for these choose a ruleset")
            if name not in self.components:
                raise RelevanceError(f"{self.name} scores {', '.join(self.components)}, not {name}; for these choose a ruleset")
        weighted = [(weight, self.one_run(model, part, names)) for weight, part in self.parts(pairs, run)]
        total: Scores = {name: sum(weight * scores[name] for weight, scores in weighted) for name in weighted[0][1]}  # type: ignore[misc]
        for name, scores in total.items():
            _check_finite(f"{self.name} gives scores of {name}", scores)
        return total

    def with_bracket(self, model: TransformerBridge, pairs: PromptPairs, component: str, *, run: Run = "corrupt") -> Estimates:
        """The scores of a kind of component, and after them the estimates of `bracket`, if this method has any."""
        if self.bracket is None or self.centre is None:
            return self(model, pairs, [component], run=run)[component].unsqueeze(1)
        estimates = {name: scores for name, scores in self.bracket(model, pairs, [component]).items() if component in scores}
        for name, scores in estimates.items():
            _check_finite(f"{self.name}'s {name} gives scores of {component}", scores[component])
        return torch.stack([self.centre(estimates)[component], *(scores[component] for scores in estimates.values())], dim=1)


def turned(pairs: PromptPairs) -> PromptPairs:
    """The pairs with clean and corrupt in each other's place."""
    return PromptPairs(pairs.corrupt, pairs.clean, pairs.target, pairs.corrupt_mask, pairs.clean_mask)


def _check_finite(what: str, scores: Float[Tensor, "batch layer index"]) -> None:
    """Refuse scores that are NaN or inf. What `propagate` looks at is finite by then: the runs that a method takes besides are left."""
    finite = scores.isfinite().all(2).all(0)
    if not bool(finite.all()):
        layer = int((~finite).nonzero()[0])
        raise RelevanceError(
            f"{what} that are not finite, first in layer {layer}: load the model in float32, or look at the clean run there"
        )


def points(model: TransformerBridge, components: Sequence[str]) -> list[str]:
    """The HookPoints of the components, in TransformerLens's short names."""
    return [COMPONENTS[name].read_at(layer) for name in components for layer in range(n_layers(model))]


_AXES = {"position": "pos", "head": "head", "neuron": "neuron"}


def collect(model: TransformerBridge, components: Sequence[str], relevance: Callable[[str], Float[Tensor, " batch *_hook"]]) -> Scores:
    """Relevance by HookPoint as scores by component."""
    scores: Scores = {}
    for name in components:
        axes = [i for i, axis in enumerate(COMPONENTS[name].axes) if axis not in ("batch", _AXES[COMPONENTS[name].index])]
        layers = [relevance(COMPONENTS[name].read_at(layer)).sum(axes) for layer in range(n_layers(model))]
        scores[name] = torch.stack([layer.to(layers[0].device) for layer in layers], dim=1)  # they may be on several devices
    return scores


@torch.no_grad()
def activations(
    model: TransformerBridge, tokens: Int[Tensor, "batch pos"], names: Sequence[str], *, pairs: PromptPairs
) -> dict[str, Tensor]:
    """Activations of one plain run."""
    arguments: dict[str, Any] = {"names_filter": list(names), **hidden(pairs)}
    with without_logits(model, tokens):
        _, cache = model.run_with_cache(tokens, **arguments)
    return {name: cache[name] for name in names}


def hidden(pairs: PromptPairs) -> dict[str, Tensor]:
    """The attention mask as an argument of the model, where it hides anything."""
    return {} if bool((pairs.corrupt_mask == 1).all()) else {"attention_mask": pairs.corrupt_mask}
