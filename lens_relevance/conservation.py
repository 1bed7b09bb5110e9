"""The conservation account: where the target's value went, layer by layer.

The sink of an operation is the relevance at its output less the relevance at its inputs; under a ruleset each has a closed form
(Rule.sink) computed from the operation's own inputs, output and upstream coefficient. The account telescopes,

    target = tokens + positions + biases + norm biases + what rules keep (norm, activation, gate, softmax, products) + edits + target,

with dictionaries also + error, which is what they miss. What features of a cross-layer transcoder carry past blocks is taken out of a row
and put into another: the column `features` adds up to zero. Under this equation

so `unexplained`, what the sinks do not account for, is zero up to rounding, unless a rule is wrong or does nothing. `edits` are hooks of
the user: what they put in place of an activation has a share of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from lens_relevance.forward import Run
from lens_relevance.hooks.placed_dictionary import before_dictionary
from lens_relevance.hooks.recording import Part, average, before_hooks
from lens_relevance.rules import Reference, Rule
from lens_relevance.rules.base import difference, per_example, share
from lens_relevance.sites import LOGITS, Anatomy, Site
from lens_relevance.sites.base import block_of
from lens_relevance.sites.stacks import Cut

_SINKS = ("biases", "norm_biases", "norm", "activation", "gate", "scores", "softmax", "product", "positions", "router", "edits", "target")

_AT_DICTIONARIES = ("error", "features")


def audited_points(anatomy: Anatomy, sites: list[Site]) -> list[str]:
    """Names of the HookPoints whose activations and coefficients the account needs."""
    names = [str(p.name) for site in sites for p in (*site.inputs, site.output) if p is not None]
    return list(dict.fromkeys([*anatomy.leaves, *(name for cut in anatomy.stacks.cuts for name in cut.names), *names]))


def row_of(name: str, rows: Sequence[str]) -> str:
    """The account's row of a site or HookPoint: its layer, the embeddings below the blocks (all, if no layers are known), or an output."""
    if len(rows) == 2:
        return rows[0]
    stack, layer = name.split("_blocks")[0], block_of(name)[1]
    below = "embed" if name.removeprefix("decoder_").startswith("embed") else ""
    for row in (f"{layer}", f"{stack} {layer}", below, f"{stack.split('_')[0]} output"):
        if row in rows:
            return row
    return rows[-1]


def row_of_hooks(name: str, cuts: Sequence[Cut], rows: Sequence[str]) -> str | None:
    """The account's row of what hooks do at a HookPoint: below the lowest cut that it is part of; None below all of them."""
    cut = next((i for i, cut in enumerate(cuts) if name in cut.names), None)
    if cut is not None:
        return rows[cut - 1] if cut else None
    return row_of(name, rows)


def _rows(summed: Tensor, batch: int) -> Tensor:
    """Per example also where a model folds positions into the batch (OPT's MLP)."""
    return summed.reshape(batch, -1).sum(1)


class Relevance:
    """Relevance at HookPoints, and what operations keep of it, summed per example.

    tensors, references and coefficients are raw, by canonical name; like: a tensor [batch], of the dtype and device of the results.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], references: Mapping[str, Tensor] | None, coefficients: Mapping[str, Tensor], like: Tensor
    ) -> None:
        self._tensors, self._references, self._coefficients, self._like = tensors, references, coefficients, like

    @property
    def is_pair(self) -> bool:
        """Whether this is the relevance of the difference between two runs."""
        return self._references is not None

    def at(self, name: str, *, signed: bool = True) -> Tensor:
        """What a HookPoint holds; 0 where nothing flows. signed=False: the sum without signs."""
        if name not in self._coefficients:
            return torch.zeros_like(self._like)
        coefficient, value = self._coefficients[name], self._tensors[name].detach()
        value = value if self._references is None else value.to(coefficient.dtype) - self._references[name]
        shares = share(value, coefficient)
        return self._summed(per_example(shares if signed else shares.abs()))

    def kept_at(self, site: Site, rule: Rule, rest: Tensor | None = None) -> Tensor | None:
        """What an operation keeps, from inputs as hooks left them to the output as dictionaries and hooks find it; None where nothing flows
        to it. rest: the same per token, where the backward told."""
        given = (before_dictionary(site.output_name), before_hooks(site.output_name), site.output_name)
        names = [*(str(p.name) for p in site.inputs), next((name for name in given if name in self._tensors), site.output_name)]
        if names[-1] not in self._coefficients:
            return None
        if rest is not None:
            return self._summed(rest)
        *inputs, output = (self._tensors[name].detach() for name in names)
        reference = None
        if self._references is not None:
            reference = Reference(tuple(self._references[x] for x in names[:-1]), self._references[names[-1]])
        return self._summed(rule.sink(site.operation, tuple(inputs), output, reference, self._coefficients[names[-1]]))

    def kept_by_hooks(self, name: str) -> Tensor:
        """What the hooks of a HookPoint keep: a tensor that they put in place of another has a share of its own."""
        return self.at(name) - self.at(before_hooks(name))

    def _summed(self, rows: Tensor) -> Tensor:
        return _rows(rows, len(self._like)).to(self._like)  # layers may be on several devices


def account(
    anatomy: Anatomy,
    placed: list[tuple[Site, Rule]],
    relevance: Relevance,
    *,
    hooked: Sequence[str],
    value: Tensor,
    target_sink: Tensor,
    average: Callable[[Tensor], Tensor],
    at_dictionaries: Sequence[tuple[str, str, Tensor]] = (),
) -> pd.DataFrame:
    """Rows per example: `embed`, each layer, `output`. `value` is the target, `relevance` that at the complete cut below the row's blocks.

    hooked: HookPoints with hooks of the user; `average` turns rows of several references into examples; at_dictionaries: HookPoint, column
    and amounts [rows] of what dictionaries keep.
    """
    zero = torch.zeros_like(value)
    cuts = {cut.row: torch.stack([relevance.at(name) for name in cut.names]).sum(0) for cut in anatomy.stacks.cuts}
    cuts.setdefault("output", value)  # where no layers are known, everything lies in one row
    rows = list(cuts)
    sinks: dict[tuple[str, str], Tensor] = {("output", "target"): target_sink}

    def add(row: str, column: str, kept: Tensor) -> None:
        sinks[row, column] = sinks.get((row, column), zero) + kept

    for roles in anatomy.stacks.roles.values():
        for name in roles["embeddings"][1:]:
            add("embed", "positions", relevance.at(name))
    for site, rule in placed:
        kept = relevance.kept_at(site, rule)
        if kept is not None:
            add(row_of(site.name, rows), rule.column(site.operation, relevance.is_pair), kept)
    for name in hooked:
        row = row_of_hooks(name, anatomy.stacks.cuts, rows)
        if row is not None:
            add(row, "edits", relevance.kept_by_hooks(name))
    for name, column, kept in at_dictionaries:
        row = row_of_hooks(name, anatomy.stacks.cuts, rows)
        if row is not None:
            add(row, column, kept)
    columns_kept = [*_SINKS, *(column for column in _AT_DICTIONARIES if any(name == column for _, name in sinks))]
    above = dict(zip(rows, [*(cuts[row] for row in rows[1:]), value], strict=True))
    frames = []
    for row in rows:
        stays = {column: average(sinks.get((row, column), zero)) for column in columns_kept}
        unexplained = average(above[row] - cuts[row]) - torch.stack(list(stays.values())).sum(0)
        columns = {"value": average(value), "relevance": average(cuts[row]), **stays, "unexplained": unexplained}
        frame = pd.DataFrame({name: column.detach().double().cpu().numpy() for name, column in columns.items()})
        frame.insert(0, "layer", row)
        frame.insert(0, "example", range(len(frame)))
        frames.append(frame)
    return pd.concat(frames).sort_values("example", kind="stable").reset_index(drop=True)


def account_of_run(
    anatomy: Anatomy,
    ruled: list[tuple[Site, Rule]],
    run: Run,
    *,
    before: Run | None,
    part: Part,
    seed: Tensor,
    value: Tensor,
    n_references: int,
    hooked: Sequence[str],
    at_dictionaries: Sequence[tuple[str, str, Tensor]] = (),
) -> pd.DataFrame:
    """The account of a run and its reference run; the sink `target` is what the logits' coefficients do not account for.

    Args:
        ruled: Sites with their rules.
        part: Tensors and coefficients at the HookPoints that `audited_points` names.
        seed: Coefficients at the logits.
        value: The target, or its difference between the two runs, per row.
        hooked: HookPoints with hooks of the user.
        at_dictionaries: What dictionaries keep (see lens_relevance.dictionaries.kept).
    """
    seed = seed.reshape(run.logits.shape)
    at_logits = per_example(share(difference(run.logits, None if before is None else before.logits), seed))
    references = None if before is None else {**part.references, LOGITS: before.logits}
    value = value.to(at_logits.dtype)
    relevance = Relevance({**part.tensors, LOGITS: run.logits}, references, {**part.coefficients, LOGITS: seed}, value)
    return account(
        anatomy,
        [(site, rule) for site, rule in ruled if site.enabled(rule)],
        relevance,
        hooked=hooked,
        value=value,
        target_sink=value - at_logits,
        average=lambda rows: average(rows, n_references),
        at_dictionaries=at_dictionaries,
    )
