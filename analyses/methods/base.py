"""What an estimator is, and where components are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError

Component = Literal["resid", "attn", "mlp", "heads", "q", "k", "v", "neurons"]
Run = Literal["corrupt", "clean", "both"]
Scores = dict[str, Float[Tensor, "batch layer index"]]
"""Per component: [batch, layer, position] for resid, attn, mlp; [batch, layer, head] and [batch, layer, neuron], summed over positions."""

POINTS: dict[str, str] = {
    "resid": "hook_resid_pre",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "heads": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "neurons": "mlp.hook_post",
}
"""HookPoint, within a block, at which each component is scored. Under grouped-query attention k and v count key-value heads."""

EMBEDDINGS = "embed.hook_out"


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
    components: tuple[Component, ...] = ("resid", "attn", "mlp", "heads", "q", "k", "v", "neurons")
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
    if component in ("heads", "q", "k", "v"):
        return relevance.sum((1, 3))
    return relevance.sum(1) if component == "neurons" else relevance.sum(2)


def _turned(pairs: PromptPairs) -> PromptPairs:
    return PromptPairs(pairs.corrupt, pairs.clean, pairs.target, pairs.corrupt_mask, pairs.clean_mask)


@torch.no_grad()
def activations(model: Any, tokens: Int[Tensor, "batch pos"], names: Sequence[str], pairs: PromptPairs) -> dict[str, Tensor]:
    """Activations of one plain run, with those of the embeddings."""
    _, cache = model.run_with_cache(tokens, names_filter=[*names, EMBEDDINGS], **hidden(pairs))
    return {name: cache[name] for name in [*names, EMBEDDINGS]}


def hidden(pairs: PromptPairs) -> dict[str, Tensor]:
    """The attention mask as an argument of the model, where it hides anything."""
    return {} if bool((pairs.corrupt_mask == 1).all()) else {"attention_mask": pairs.corrupt_mask}
