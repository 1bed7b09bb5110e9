"""Attention of a component computed by rows: its result is replaced at z, and what the component computes meanwhile is made small.

What the component is given in place of all keys are the first few, so that it computes what the site says of these: the two are compared,
and a difference is an error.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lens_relevance.hooks.placed_rule import PlacedRule
from lens_relevance.hooks.recomputation import check_value
from lens_relevance.hooks.session import Session
from lens_relevance.memory.trial import trial
from lens_relevance.rules.attention_by_rows import AttentionByRows, AttentionByRowsRule, passes_by_rows
from lens_relevance.rules.base import Rule
from lens_relevance.sites import Site
from lens_relevance.sites.attention_by_rows import SiteByRows, as_one

AT_ONCE = 2**22  # entries of scores that are computed at once, bit by bit as the model does: 16 MiB in fp32
_COMPARED = 16  # keys that the component gets


def is_large(batch: int, n_heads: int, positions: int) -> bool:
    """Whether attention of this size is better computed by rows; a trial says so itself."""
    way = trial()
    return batch * n_heads * positions**2 > AT_ONCE if way is None else way.by_rows


def by_rows(ruled: list[tuple[Site, Rule]], *, asked: Collection[str], batch: int, positions: int) -> list[tuple[Site, Rule]]:
    """Sites and their rules, with each attention as one site that is better computed by rows.

    Its scores are large, no one reads scores and pattern (asked: names of HookPoints that are read), and its rules pass the rows
    of a pattern one by one.
    """
    attentions: dict[Any, list[tuple[Site, Rule]]] = {}
    for site, rule in ruled:
        if site.component is not None and site.kind in ("scores", "pattern", "z"):
            attentions.setdefault(site.component, []).append((site, rule))
    instead: dict[Site, list[tuple[Site, Rule]]] = {}
    for steps in attentions.values():
        one = as_one([site for site, _ in steps])
        if one is None:
            continue
        assert isinstance(one.operation, AttentionByRows)
        large = is_large(batch, one.operation.geometry.n_heads, positions)
        seen = any(point.name in asked or point.has_hooks() for point in one.silent)
        if large and not seen and all(passes_by_rows(rule) for _, rule in steps):
            instead |= {site: [] for site, _ in steps} | {steps[-1][0]: [(one, AttentionByRowsRule(*(rule for _, rule in steps)))]}
    return [pair for site, rule in ruled for pair in instead.get(site, [(site, rule)])]


def place_by_rows(opened: Session, site: SiteByRows, rule: Rule) -> None:
    """Put the rule of an attention by rows on its site."""
    placed = opened.place(site, rule)
    assert site.output is not None and site.component is not None
    opened.state(site.output).replace = lambda result: _by_rows(placed, result)
    for point in site.silent:
        opened.state(point).silent = True
    opened.stand_in(site.component, "_update_kv_cache", _first_keys)


def _first_keys(k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return k[..., :_COMPARED, :], v[..., :_COMPARED, :]


@torch.no_grad()
def _by_rows(placed: PlacedRule, result: Tensor) -> Tensor:
    """z by rows, in place of the component's own result for a few keys."""
    site, operation = placed.site, placed.site.operation
    assert isinstance(operation, AttentionByRows)
    if len(placed.captured) < len(site.inputs):
        return result  # an error, as soon as the rule is asked for
    inputs = tuple(placed.captured[i] for i in range(len(site.inputs)))
    check_value(site, result, operation.to_keys(inputs, slice(0, min(_COMPARED, result.shape[-2]))))
    return operation(*inputs).to(result.dtype)
