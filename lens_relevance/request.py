"""What a call of `propagate` asks for: everything that is known before the model runs, read and checked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from lens_relevance.defaults import with_defaults
from lens_relevance.dictionaries import Dictionary
from lens_relevance.dictionaries.placement import Dictionaries, place_on
from lens_relevance.errors import RelevanceError
from lens_relevance.forward import Run, metric_before, positions_of
from lens_relevance.hooked_model import HookedModel
from lens_relevance.hooks.conditional import AnyCondition, Condition, Through, read_conditions
from lens_relevance.hooks.placed_dictionary import DictionaryPath
from lens_relevance.hooks.read_positions import UNEMBEDDING, ReadPositions
from lens_relevance.hooks.recording import NamesFilter, wanted
from lens_relevance.inputs.metrics import Metric
from lens_relevance.inputs.prompt import Inputs, Prompt, read_inputs
from lens_relevance.inputs.references import ReferenceRun, is_inputs, reference_inputs, reference_run
from lens_relevance.inputs.targets import AnyTarget, Latent, Target, as_target, top_prediction
from lens_relevance.ruleset_tables import Table, needs_reference, ruleset, ruleset_name
from lens_relevance.sites import Anatomy


@dataclass(frozen=True)
class Request:
    """A question to a model.

    Attributes:
        rules: The ruleset as it was named.
        table: The ruleset.
        prompt: What the model is called with: the inputs, and what the target adds to them.
        target: None where each row's top prediction is explained, which is known after the forward.
        point: The HookPoint of a latent target.
        names: Of the HookPoints to keep.
        explicit: Those that were asked for by name.
        conditions: Units that relevance has to pass.
        against: The reference as it was named, or the one by default.
        reference: The runs to compare with.
        dictionaries: Sparse autoencoders and transcoders on the model's HookPoints.
        metric: The target as a function of the logits, where that is known before the forward.
        reading: The positions at which logits are read; None for all.
    """

    rules: str | Table
    table: Table
    prompt: Prompt
    target: Target | None
    point: str | None
    names: list[str]
    explicit: Collection[str]
    conditions: list[AnyCondition]
    against: Any
    reference: ReferenceRun | None
    dictionaries: Dictionaries
    metric: Metric | None
    reading: ReadPositions | None

    @property
    def n_references(self) -> int:
        """References per example; 1 where there is none."""
        return 1 if self.reference is None else self.reference.n

    @property
    def asked(self) -> list[str]:
        """Names of the HookPoints whose tensors are needed."""
        further = [condition.name for condition in self.conditions if isinstance(condition, Condition)]
        return [*self.names, *further, *([] if self.point is None or self.target_feature else [self.point])]

    @property
    def target_feature(self) -> bool:
        """Whether the target is a feature of a dictionary."""
        return any(placed.target is not None for placed in self.dictionaries.placed)


def read_request(
    model: HookedModel,
    anatomy: Anatomy,
    inputs: Inputs,
    *,
    target: AnyTarget | None,
    rules: str | Table | None,
    names_filter: NamesFilter,
    reference: Any,
    attention_mask: Shaped[Tensor, "batch pos"] | None,
    through: Through,
    dictionaries: Sequence[Dictionary] = (),
    dictionary_path: DictionaryPath = "features",
) -> Request:
    """The arguments of `propagate` as a Request; raises RelevanceError where they do not fit the model or each other."""
    given = prompt = read_inputs(model, inputs, attention_mask)
    rules, reference = with_defaults(model, prompt, rules, reference=reference)
    table = table_for(rules, reference)
    target = None if target is None else as_target(target)
    if target is not None:
        prompt = _extended(model, target, given)
    names, explicit = wanted(anatomy, names_filter)
    placed = place_on(anatomy, dictionaries, table, path=dictionary_path)
    conditions = read_conditions(anatomy, through, placed.placed, n_positions=prompt.tokens.shape[1])
    point = None if target is None or target.point is None else anatomy.canonical(target.point)
    if isinstance(target, Latent) and target.feature is not None and point is not None:
        point = placed.at(point).explain(target.feature)
    runs = None if reference is None else _reference(model, reference, target, given, prompt)
    request = Request(rules, table, prompt, target, point, names, explicit, conditions, reference, runs, placed, None, None)
    if set(request.asked) & set(UNEMBEDDING):
        return request
    metric, reading = metric_before(model, prompt, target, n=request.n_references)
    return replace(request, metric=metric, reading=reading)


def target_of(model: HookedModel, anatomy: Anatomy, request: Request, run: Run) -> tuple[Target, Metric]:
    """The target, each row's top prediction where none was given, and it as a function of the logits (or latent) that the run gave."""
    if request.target is not None and request.metric is not None and request.reading is not None and request.reading.taken:
        return request.target, request.metric.of_read()
    tokens, mask = positions_of(request.prompt, anatomy, request.point, run=run)
    target = top_prediction(run.root[:: request.n_references], tokens, mask) if request.target is None else request.target
    return target, target.metric(model, tokens, mask)


def table_for(rules: str | Table, reference: Any) -> Table:
    """A ruleset by name or as it is; refused where it compares two runs and there is no other."""
    table = ruleset(rules)
    if needs_reference(table) and reference is None:
        raise RelevanceError(
            f"ruleset {ruleset_name(rules)!r} compares two runs: pass reference= a prompt of the same length, or mean_embedding() or "
            "random_tokens(8) where the prompt has no counterpart"
        )
    return table


def _extended(model: HookedModel, target: Target, prompt: Prompt) -> Prompt:
    """The prompt with what the target itself adds to it (a continuation)."""
    tokens, mask = target.extend(model, prompt.tokens, prompt.mask)
    return prompt if tokens is prompt.tokens else prompt.with_tokens(tokens, mask)


def _reference(model: HookedModel, reference: Any, target: Target | None, given: Prompt, prompt: Prompt) -> ReferenceRun:
    """The reference runs. A target's continuation follows the reference as it follows the prompt."""
    if is_inputs(reference) or (isinstance(reference, Tensor) and not prompt.ids):
        other = reference_inputs(model, reference, given)
        return ReferenceRun(other if target is None else _extended(model, target, other))
    return reference_run(model, reference, prompt, tail=int(prompt.mask.sum() - given.mask.sum()) // len(given.mask))
