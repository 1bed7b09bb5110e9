"""Scores of a model's heads by many methods, example by example."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.known_roles.cases import Case
from lens_relevance import propagate, token_relevance
from lens_relevance.inputs.prompt import read_inputs
from lens_relevance.sites import HookedModule, anatomy

SINGLE = ("attnlrp", "cp_lrp", "relp", "gim", "gradient")
PAIR = ("deeplift", "deeplift_ln", "attnlrp", "cp_lrp", "relp", "gim", "gradient")
FROM_ATTENTION = ("weighted_accumulation", "chefer_2021b", "chefer_2021a", "legrad", "gradient_attention", "rollout", "raw_attention")
Scores = dict[str, Float[Tensor, "example layer head"]]


def head_scores(model: HookedModule, case: Case, stack: str | None = None) -> Scores:
    """Every method's scores of the heads of a stack.

    Relevance is that of each head's z, summed over positions: of the run alone, or of its difference from the counterpart ("... pair").
    Patching sets one head's z to the other run's: what the target loses (noising) or the counterpart gains (denoising).

    Args:
        model: a model whose sites and attentions are declared.
        case: runs of it.
        stack: the stack whose heads are scored; the only one by default.
    """
    body = anatomy(model)
    names = body.stacks.roles[stack or next(iter(body.stacks.roles))]["z"]
    scores: Scores = {}
    for rules in SINGLE:
        scores[rules] = _relevance(model, case, names, rules=rules)
    for rules in PAIR:
        scores[f"{rules} pair"] = _relevance(model, case, names, rules=rules, reference=case.reference)
    chosen = [i for i, one in enumerate(body.attentions) if stack is None or _block(one.pattern) in {_block(name) for name in names}]
    for method in FROM_ATTENTION:
        scores[method] = token_relevance(model, case.inputs, case.target, method=method).heads[:, chosen]
    scores |= _patching(model, case, names)
    scores["depth"] = torch.arange(len(names)).reshape(1, -1, 1).expand_as(case.role).float()
    return {name: one.detach().float() for name, one in scores.items()}


def _block(name: str) -> str:
    return name.rsplit(".", 1)[0]


def _relevance(model: HookedModule, case: Case, names: list[str], **settings: Any) -> Float[Tensor, "example layer head"]:
    cache = propagate(model, case.inputs, case.target, names_filter=names, **settings)
    return torch.stack([cache[name].sum((1, 3)) for name in names], 1)


@torch.no_grad()
def _patching(model: HookedModule, case: Case, names: list[str]) -> Scores:
    """All heads in one batch: each row of the model's inputs as often as there are heads."""
    clean, other = read_inputs(model, case.inputs), read_inputs(model, case.reference)
    metric = case.target.metric(model, clean.tokens, clean.mask)
    n_heads, values = case.role.shape[2], {}
    kept: dict[str, dict[str, Tensor]] = {"clean": {}, "other": {}}
    for run, prompt in (("clean", clean), ("other", other)):
        with model.hooks(fwd_hooks=[(name, partial(_keep, kept[run])) for name in names]):
            values[run] = metric(prompt.call(model))
    patched = {}
    for run, donor, prompt in (("clean", "other", clean), ("other", "clean", other)):
        columns = []
        for name in names:
            with model.hooks(fwd_hooks=[(name, partial(_exchange, kept[donor][name], n_heads))]):
                logits = prompt.repeat(n_heads).call(model)
            columns.append(torch.stack([metric(logits[head::n_heads]) for head in range(n_heads)], -1))
        patched[run] = torch.stack(columns, 1)
    base = {run: value[:, None, None] for run, value in values.items()}
    return {"noising": base["clean"] - patched["clean"], "denoising": patched["other"] - base["other"]}


def _keep(kept: dict[str, Tensor], z: Tensor, hook: Any) -> None:
    kept[hook.name] = z


def _exchange(donor: Tensor, n_heads: int, z: Tensor, hook: Any) -> Tensor:
    """Row i of each example's n_heads rows gets the donor's z at head i."""
    split = z.unflatten(0, (-1, n_heads)).unflatten(-1, (n_heads, -1)).clone()  # [example, row, pos, head, d_head]
    given = donor.unflatten(-1, (n_heads, -1))
    for head in range(n_heads):
        split[:, head, :, head] = given[:, :, head]
    return split.flatten(-2).flatten(0, 1)
