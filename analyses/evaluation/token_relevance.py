"""Every method of token relevance by the same prompts: faithfulness, plausibility, random weights, and cost, in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.datasets.streaming import PairStream
from analyses.evaluation.agreement import mean_with_interval
from analyses.evaluation.passes import counted
from analyses.evaluation.randomised_relevance import RANDOMISED_COLUMNS, randomised_relevance
from analyses.evaluation.removal_measures import average_precision, comprehensiveness, faithfulness_correlation, saco, sufficiency
from analyses.methods import estimator, method_names
from analyses.perturbation import Attribution, TextRemoval, attribution, passes
from analyses.perturbation.removal import removable_tokens
from analyses.tasks import PromptPairs
from analyses.tasks.pairs import require_pairs
from lens_relevance import RelevanceError
from lens_relevance.attention_methods.methods import ALIASES
from lens_relevance.hooks.model_state import left_as_found
from lens_relevance.inputs.targets import as_target

MEASURES = ("saco", "faithfulness_correlation", "comprehensiveness", "sufficiency", "plausibility")
COSTS = ("forwards", "backwards", "processor_seconds")
COLUMNS = ("method", *(f"{name}{end}" for name in MEASURES for end in ("", "_low", "_high")), *COSTS)
UNCHANGED = 0.5
"""A method does not change with the weights if its rank correlation with itself on a model of random weights is this or more."""


@dataclass(frozen=True, eq=False)
class TokenEvaluation:
    """Methods of token relevance, evaluated.

    Attributes:
        table: a row per method: each of `MEASURES` with its 95 % bootstrap interval over prompts (_low, _high), and what one explanation
            takes: passes through the model (forwards, backwards) and processor_seconds. NaN: not defined there (plausibility of prompts
            without a counterpart).
        randomised: a row per method and part of the model whose weights were made random: method, kind ("cascading": this part and all
            above it, "independent": this part alone), part, spearman of the scores with those of the trained model (mean over prompts),
            low, high. Methods that take no backward pass are left out; empty where this was not asked for.
        left_out: methods that cannot explain these prompts on this model, with the reason.
        prompts: how many there were; chance: the part of the tokens that is evidence, NaN where none is.
    """

    table: pd.DataFrame
    randomised: pd.DataFrame
    left_out: dict[str, str]
    prompts: int
    chance: float

    @property
    def after_randomisation(self) -> pd.DataFrame:
        """Rows of `randomised` with all weights random: method, spearman, low, high."""
        whole = self.randomised[self.randomised["kind"] == "cascading"].groupby("method", sort=False).tail(1)
        return whole[["method", "spearman", "low", "high"]].reset_index(drop=True)

    @property
    def unchanged(self) -> list[str]:
        """Methods whose scores stay much the same when all weights are random (Spearman at least `UNCHANGED`)."""
        whole = self.after_randomisation
        return whole.loc[whole["spearman"] >= UNCHANGED, "method"].tolist()


def token_methods() -> list[str]:
    """Names of all methods that score the tokens of single prompts: rulesets, token relevance, what was registered, and the baselines."""
    found = [name for name in method_names() if name not in ALIASES and estimator(name).tokens is not None]
    return list(dict.fromkeys([*found, "occlusion", "random"]))


@left_as_found
def evaluate_token_relevance(
    model: TransformerBridge,
    pairs: PromptPairs,
    methods: Sequence[str] | None = None,
    *,
    baseline: str = "mean_embedding",
    randomised_prompts: int = 8,
    most_passes: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    checkpoint: str | Path | None = None,
) -> TokenEvaluation:
    """Evaluate methods of token relevance on the clean prompts of pairs.

    The measures are those of `analyses.evaluation.removal_measures`: SaCo, faithfulness correlation, comprehensiveness and sufficiency ask
    what the target becomes without some tokens, plausibility whether the evidence comes first. The evidence is what differs between the
    two prompts of a pair. The first token (BOS) is no candidate, and is never removed.

    Args:
        pairs: prompts with their target. Single prompts are pairs whose two prompts are the same: they have no evidence.
        methods: names (see `token_methods`); all of them if left out, but for those that this model does not allow.
        baseline: what stands where a token was removed, of `analyses.perturbation.BASELINES`.
        randomised_prompts: how many prompts are explained again on models whose weights are random; 0 for none.
        most_passes: methods that take more passes through the model (forward and backward) for a prompt are left out.
        seed: of random subsets, tokens and weights.
        batch_size: prompts that are explained together.
        checkpoint: a folder; an interrupted run that is started again goes on from there, also with other methods.

    Raises:
        RelevanceError: no or unknown methods, or one that was named and does not work on this model.
    """
    pairs = require_pairs(pairs)
    named = token_methods() if methods is None else list(methods)
    cheap, left_out = _affordable(named, pairs.clean.shape[1], most_passes)
    chosen, impossible = _that_work(model, pairs, cheap, all_must=methods is not None)
    stream = PairStream(model, pairs, batch_size, checkpoint=checkpoint, analysis="token relevance", baseline=baseline, seed=seed)
    step = _Step(model, baseline, seed, pairs.clean.shape[1])
    rows, scores = [], {}
    for name, method in chosen.items():
        found, _ = stream.collect(name, lambda batch, method=method: step(batch, method), name)  # type: ignore[misc]
        scores[name] = found.pop("scores")
        rows.append({"method": name} | _summary({key: values.numpy() for key, values in found.items()}))
    table = pd.DataFrame(rows)
    by_gradient = {name: chosen[name] for name in table.loc[table["backwards"] > 0, "method"]}
    randomised = pd.DataFrame(columns=list(RANDOMISED_COLUMNS))
    if randomised_prompts and by_gradient:
        few = pairs[:randomised_prompts]
        known = {name: scores[name][: len(few)] for name in by_gradient}
        folder = None if checkpoint is None else Path(checkpoint) / "randomised"
        randomised = randomised_relevance(model, few, by_gradient, known, seed=seed, batch_size=batch_size, checkpoint=folder)
    evidence, candidates = evidence_of(pairs), removable_of(pairs)
    chance = float((evidence.sum(1) / candidates.sum(1)).mean()) if bool(evidence.any()) else float("nan")
    return TokenEvaluation(table, randomised, left_out | impossible, len(pairs), chance)


def removable_of(pairs: PromptPairs) -> Bool[Tensor, "n pos"]:
    """Tokens of the clean prompts that may be removed: all real ones but the first."""
    return removable_tokens(pairs.clean_mask)


def evidence_of(pairs: PromptPairs) -> Bool[Tensor, "n pos"]:
    """Tokens in which a clean prompt differs from its counterpart."""
    return (pairs.clean != pairs.corrupt).cpu() & removable_of(pairs)


def _affordable(names: Sequence[str], n_tokens: int, most_passes: int | None) -> tuple[list[str], dict[str, str]]:
    """The methods that take no more passes, and why the others are left out."""
    taken = {name: sum(passes(name, n_tokens)) for name in names} if most_passes is not None else {}
    dear = {name: f"it takes {n} passes, and {most_passes} were allowed" for name, n in taken.items() if n > (most_passes or 0)}
    return [name for name in names if name not in dear], dear


def _that_work(
    model: TransformerBridge, pairs: PromptPairs, names: Sequence[str], *, all_must: bool
) -> tuple[dict[str, Attribution], dict[str, str]]:
    """The methods, by name, that can explain the first prompt, and why the others cannot."""
    if not names:
        raise RelevanceError(f"give at least one method, of {', '.join(token_methods())}")
    chosen, left_out, first = {name: attribution(name) for name in names}, {}, pairs[:1].cropped()
    for name, method in list(chosen.items()):
        try:
            method(model, first.clean, as_target(first.target), first.clean_mask)
        except RelevanceError as error:
            if all_must:
                raise
            left_out[name] = str(error)
            del chosen[name]
    return chosen, left_out


class _Step:
    """Scores, measures and costs of one method on a batch; what the model does without some tokens is asked once for all methods."""

    def __init__(self, model: TransformerBridge, baseline: str, seed: int, width: int) -> None:
        self.model, self.baseline, self.seed, self.width = model, baseline, seed, width
        self._removals: dict[bytes, TextRemoval] = {}

    def __call__(self, batch: PromptPairs, method: Attribution) -> dict[str, Tensor]:
        key, batch = batch.clean.cpu().numpy().tobytes(), batch.cropped()
        target = as_target(batch.target)
        with counted(self.model) as cost:
            scores = method(self.model, batch.clean, target, batch.clean_mask).detach().double().cpu()
        if key not in self._removals:
            self._removals[key] = TextRemoval(
                self.model, batch.clean, batch.clean_mask, target=target, baseline=self.baseline, seed=self.seed
            )
        removal, removable, tokens = self._removals[key], removable_of(batch), int(batch.clean_mask.sum())
        each: dict[str, Callable[..., Tensor]] = {"saco": saco, "comprehensiveness": comprehensiveness, "sufficiency": sufficiency}
        measures = {name: measure(scores, removable, removal) for name, measure in each.items()}
        measures["faithfulness_correlation"] = faithfulness_correlation(scores, removable, removal, seed=self.seed)
        measures["plausibility"] = average_precision(scores, evidence_of(batch), removable)
        costs = (cost.forward_tokens / tokens, cost.backward_tokens / tokens, cost.seconds / len(batch))
        measures |= {name: torch.full((len(batch),), value) for name, value in zip(COSTS, costs, strict=True)}
        return measures | {"scores": _widened(scores, self.width)}


def _widened(scores: Float[Tensor, "batch pos"], width: int) -> Float[Tensor, "batch width"]:
    return torch.nn.functional.pad(scores, (0, width - scores.shape[1]))


def _summary(found: dict[str, np.ndarray]) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in MEASURES:
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), mean_with_interval(found[name]), strict=True))
    return row | {name: float(found[name].mean()) for name in COSTS}
