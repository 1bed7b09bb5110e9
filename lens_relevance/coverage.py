"""Which rules hold where on a model, proved by running it.

It is also the canary for a new release of TransformerLens or transformers: a rule that no longer does what it should shows as a site that
is not live, or as relevance that the conservation account cannot explain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from lens_relevance.engine import propagate
from lens_relevance.errors import RelevanceError
from lens_relevance.rulesets import needs_reference, rule_for, ruleset, rulesets
from lens_relevance.sites import Site, anatomy
from lens_relevance.targets import logit_diff


@dataclass(frozen=True)
class Coverage:
    """What `coverage` found.

    sites: one row per operation: site, operation, inputs, output, live (a gradient passed its output), and the rule under each ruleset.
    rulesets: one row per ruleset: ruleset, works, unexplained (largest share of the target that the conservation account leaves open),
        reason (why it does not work).
    uncovered: component -> why it has no site.
    """

    sites: pd.DataFrame
    rulesets: pd.DataFrame
    uncovered: dict[str, str]


def coverage(model: Any, names: Sequence[str] | None = None, positions: int = 8, seed: int = 0) -> Coverage:
    """Run each ruleset on random tokens, with the audit, and list every site of the model.

    names: rulesets to try, all registered ones by default. positions: length of the random prompt. The model is left as it was.
    """
    body = anatomy(model)
    vocabulary = int(model.cfg.d_vocab)
    if vocabulary < 2:
        raise RelevanceError("coverage runs the model on random tokens, and this model takes none (a vision or audio model)")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens, other = (torch.randint(0, vocabulary, (1, positions), generator=generator).to(device) for _ in range(2))
    listed = list(names) if names is not None else list(rulesets())
    rows, live = [], set()
    for name in listed:
        reference = other if needs_reference(ruleset(name)) else None
        try:
            cache = propagate(model, tokens, logit_diff(0, 1), name, names_filter=lambda _: True, reference=reference, audit=True)
        except RelevanceError as error:
            rows.append((name, False, float("nan"), str(error)))
            continue
        account = cache.conservation()
        live |= set(cache.coefficients)
        worst = float((account["unexplained"].abs() / account["value"].abs().clip(lower=1e-6)).max())
        rows.append((name, worst < 1e-2, worst, "" if worst < 1e-2 else "the conservation account does not close"))
    sites = pd.DataFrame(
        {
            "site": site.name,
            "operation": site.kind,
            "inputs": ", ".join(str(p.name) for p in site.inputs),
            "output": site.output_name,
            "live": site.output is None or site.output_name in live,
            **{name: _rule_in_words(name, site) for name in listed},
        }
        for site in body.sites
        if site.enabled()
    )
    table = pd.DataFrame(rows, columns=["ruleset", "works", "unexplained", "reason"])
    return Coverage(sites, table, dict(body.uncovered))


def _rule_in_words(name: str, site: Site) -> str:
    try:
        return repr(rule_for(ruleset(name), site))
    except RelevanceError:
        return "cannot be placed"
