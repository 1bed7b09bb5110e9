"""What becomes of an attack: an error, right numbers all the same, or wrong numbers without a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

from analyses.benchmarks.tiny_models import build
from lens_relevance import CoverageError, LivenessError, MismatchError, RelevanceCache, RelevanceError, attach, propagate, rulesets
from lens_relevance.coverage_table import random_inputs, target_for
from lens_relevance.inputs.prompt import read_inputs
from lens_relevance.ruleset_keys import check_keys
from lens_relevance.ruleset_tables import needs_reference, ruleset
from lens_relevance.sites import Site, anatomy
from tests.attacks.faults import Fault

NOTICED, RIGHT, SILENT = "noticed", "right", "SILENT"
UNFIT = "–"  # a ruleset with entries for places that this model has none of


def outcomes(fault: Fault, names: Iterable[str] = tuple(rulesets())) -> dict[str, str]:
    """By ruleset: what plain `propagate` makes of a fault. Right means that the conservation account closes, at every layer."""
    with pytest.MonkeyPatch.context() as patch:
        model = build(fault.family)
        inputs, other = pair(model)
        if fault.late:
            propagate(model, inputs, target_for(model), rules="attnlrp")
        fault.make(model, patch)
        sites = anatomy(model).sites
        return {name: _outcome(model, inputs, other, name) if _fits(name, sites) else UNFIT for name in names}


def pair(model: Any) -> tuple[Any, Any]:
    """Two random inputs for a model."""
    return tuple(random_inputs(model, 2, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))  # type: ignore[return-value]


def _fits(name: str, sites: Sequence[Site]) -> bool:
    try:
        check_keys(ruleset(name), sites)
    except RelevanceError:
        return False
    return True


def _outcome(model: Any, inputs: Any, other: Any, name: str) -> str:
    reference = other if needs_reference(ruleset(name)) else None
    try:
        cache = propagate(model, inputs, target_for(model), rules=name, reference=reference, audit=True)
    except (CoverageError, LivenessError, MismatchError):
        return NOTICED
    return RIGHT if open_share(cache) < 1e-5 else SILENT


def attached(fault: Fault, name: str) -> str:
    """What `attach` makes of a fault."""
    with pytest.MonkeyPatch.context() as patch:
        model = build(fault.family)
        inputs, other = pair(model)
        fault.make(model, patch)
        reference = other if needs_reference(ruleset(name)) else None
        try:
            with attach(model, name, reference=reference):
                logits = read_inputs(model, inputs).call(model)
                logits[:, -1].sum().backward()
        except (CoverageError, LivenessError, MismatchError):
            return NOTICED
        return RIGHT


def open_share(cache: RelevanceCache) -> float:
    """The largest remainder of any layer that the account leaves open, relative to the target (to 1 where it is smaller)."""
    account = cache.conservation()
    return float((account["unexplained"].abs() / account["value"].abs().clip(lower=1.0)).max())
