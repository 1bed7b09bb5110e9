"""The conservation account: where the target's value went, layer by layer.

The sink of an operation is the relevance at its output less the relevance at its inputs; under a ruleset each has a closed form
(Rule.sink) computed from the operation's own inputs, output and upstream coefficient. The account telescopes,

    target = tokens + positions + biases + norm biases + what rules keep (norm, activation, gate, softmax, products) + target,

so `unexplained`, what the sinks do not account for, is zero up to rounding, unless a rule is wrong or does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from lens_relevance.rules import Reference, Rule
from lens_relevance.rules.base import per_example, share
from lens_relevance.sites import Anatomy, Site

COLUMNS = ("biases", "norm_biases", "norm", "activation", "gate", "scores", "softmax", "product", "positions", "router", "target")


def audited_points(anatomy: Anatomy, sites: list[Site]) -> list[str]:
    """Names of the HookPoints whose activations and coefficients the account needs."""
    names = [str(p.name) for site in sites for p in (*site.inputs, site.output) if p is not None]
    return list(dict.fromkeys([*anatomy.leaves, *(name for cut in anatomy.stacks.cuts for name in cut.names), *names]))


def _row(site: Site, rows: Sequence[str]) -> str:
    """The account's row of a site: its layer, or the embeddings below the blocks (all, where no layers are known), or an output."""
    if len(rows) == 2:
        return rows[0]
    stack, layer = site.name.split("_blocks")[0], site.layer
    below = "embed" if site.name.removeprefix("decoder_").startswith("embed") else ""
    for row in (f"{layer}", f"{stack} {layer}", below, f"{stack.split('_')[0]} output"):
        if row in rows:
            return row
    return rows[-1]


def _rows(summed: Tensor, batch: int) -> Tensor:
    """Per example also where a model folds positions into the batch (OPT's MLP)."""
    return summed.reshape(batch, -1).sum(1)


def _relevance_at(
    activations: dict[str, Tensor], references: dict[str, Tensor] | None, coefficients: dict[str, Tensor], zero: Tensor, name: str
) -> Tensor:
    """Relevance at a HookPoint, summed per example."""
    if name not in coefficients:
        return zero
    a = activations[name] if references is None else activations[name].to(coefficients[name].dtype) - references[name]
    return _rows(per_example(share(a, coefficients[name])), len(zero)).to(zero.device)  # layers may be on several devices


def account(
    anatomy: Anatomy,
    placed: list[tuple[Site, Rule]],
    activations: dict[str, Tensor],
    *,
    references: dict[str, Tensor] | None,
    coefficients: dict[str, Tensor],
    value: Tensor,
    target_sink: Tensor,
    average: Callable[[Tensor], Tensor],
) -> pd.DataFrame:
    """Rows per example: `embed`, each layer, `output`. `value` is the target, `relevance` that at the complete cut below the row's blocks.

    activations, references and coefficients are raw tensors by canonical name; `average` turns rows of several references into examples.
    """
    zero = torch.zeros_like(value)
    at = partial(_relevance_at, activations, references, coefficients, zero)
    cuts = {cut.row: torch.stack([at(name) for name in cut.names]).sum(0) for cut in anatomy.stacks.cuts}
    cuts.setdefault("output", value)  # where no layers are known, everything lies in one row
    rows = list(cuts)
    sinks: dict[tuple[str, str], Tensor] = {("output", "target"): target_sink}
    for roles in anatomy.stacks.roles.values():
        for name in roles["embeddings"][1:]:
            sinks["embed", "positions"] = sinks.get(("embed", "positions"), zero) + at(name)
    for site, rule in placed:
        names = [*(str(p.name) for p in site.inputs), site.output_name]
        if names[-1] not in coefficients:
            continue
        *inputs, output = (activations[name] for name in names)
        reference = None if references is None else Reference(tuple(references[x] for x in names[:-1]), references[names[-1]])
        kept = rule.sink(site.operation, tuple(inputs), output, reference, coefficients[names[-1]])
        key = (_row(site, rows), rule.column(site.operation, references is not None))
        sinks[key] = sinks.get(key, zero) + _rows(kept, len(zero)).to(zero)
    above = dict(zip(rows, [*(cuts[row] for row in rows[1:]), value], strict=True))
    frames = []
    for row in rows:
        stays = {column: average(sinks.get((row, column), zero)) for column in COLUMNS}
        unexplained = average(above[row] - cuts[row]) - torch.stack(list(stays.values())).sum(0)
        columns = {"value": average(value), "relevance": average(cuts[row]), **stays, "unexplained": unexplained}
        frame = pd.DataFrame({name: column.detach().double().cpu().numpy() for name, column in columns.items()})
        frame.insert(0, "layer", row)
        frame.insert(0, "example", range(len(frame)))
        frames.append(frame)
    return pd.concat(frames).sort_values("example", kind="stable").reset_index(drop=True)
