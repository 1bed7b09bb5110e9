"""Pair rules add up, and every run shows it: the relevance at a complete cut is what the target's coefficients give its root.

What rightly stays behind between the cut and the root is counted: a router's changed choice, what norms keep whose scale a rule holds
constant (`deeplift_ln`), the errors of dictionaries, and what hooks of the user put in place of an activation. So the check holds for
tables whose other rules are all exact between two runs; for others the account is the place to look.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.conservation import Relevance, row_of, row_of_hooks
from lens_relevance.dictionaries.kept import stays
from lens_relevance.dictionaries.placement import Dictionaries
from lens_relevance.errors import MismatchError
from lens_relevance.hooks.recording import Part, before_hooks
from lens_relevance.hooks.session import Session
from lens_relevance.rules import Rule
from lens_relevance.rules.base import per_example, share
from lens_relevance.rules.normalization import NormRule
from lens_relevance.sites import Anatomy, Site
from lens_relevance.sites.stacks import Cut

# Of the sum of what is added up, without signs.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def adds_up(anatomy: Anatomy, placed: Sequence[tuple[Site, Rule]], dictionaries: Dictionaries) -> bool:
    """Whether relevance has to add up under these rules: each is exact between two runs, but for those of norms, and no part of the model
    is without a site."""
    used = [rule for site, rule in placed if site.enabled(rule) or site.considered(rule)]
    used += [placed.rule for placed in dictionaries.placed]
    return not anatomy.uncovered and all(rule.is_exact or isinstance(rule, NormRule) for rule in used)


class Completeness:
    """Adds up, part by part as the backward delivers it, what flows through the complete cuts of a model and what stays above them.

    names: HookPoints that it has to see. hooked: HookPoints with hooks of the user. session: where the rules are.
    """

    def __init__(
        self, anatomy: Anatomy, placed: Sequence[tuple[Site, Rule]], hooked: Sequence[str], *, dictionaries: Dictionaries, session: Session
    ) -> None:
        self._anatomy, self._hooked, self._dictionaries = anatomy, list(hooked), dictionaries
        self._keeping = [(site, rule) for site, rule in placed if site.kind == "experts" or not rule.is_exact]
        self._placed = {id(placed.site): placed for placed in session.placed}
        self._beside = [name for roles in anatomy.stacks.roles.values() for name in roles["embeddings"][1:]]  # positions
        self._through: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}
        self._stays: dict[str, Tensor] = {}
        inner = [str(p.name) for site, _ in self._keeping for p in (*site.inputs, site.output) if p is not None]
        cuts = [name for cut in anatomy.stacks.cuts for name in cut.names]
        self.names = list(dict.fromkeys([*anatomy.leaves, *cuts, *inner]))

    def add(self, part: Part, like: Float[Tensor, " rows"]) -> None:
        """Take in what the backward found in one part of the model."""
        relevance = Relevance(part.tensors, part.references, part.coefficients, like)
        for name in (n for n in self.names if n in part.tensors):
            self._through[name] = relevance.at(name)
            self._sizes[name] = relevance.at(name, signed=False)
        rows = self._rows
        for site, rule in self._keeping:
            rest = placed.last.rest if (placed := self._placed.get(id(site))) is not None and placed.last is not None else None
            kept = relevance.kept_at(site, rule, rest) if site.enabled(rule) else None
            if kept is not None:
                self._stay(row_of(site.name, rows), kept)
        for name in (n for n in self._hooked if before_hooks(n) in part.tensors):
            row = row_of_hooks(name, self._anatomy.stacks.cuts, rows)
            if row is not None:
                self._stay(row, relevance.kept_by_hooks(name))

        for name, _, kept in stays(self._dictionaries, part, like):
            row = row_of_hooks(name, self._anatomy.stacks.cuts, rows)
            if row is not None:
                self._stay(row, kept)

    def refuse_a_gap(self, root: Tensor, reference: Tensor, seed: Tensor, *, below: Collection[str]) -> None:
        """Raise MismatchError where a cut holds more or less than the target's coefficients give its root, less what stays above it.

        root, reference: the tensor that the target is a function of, in both runs [rows, pos, ...]; seed: the target's coefficients there.
        below: HookPoints that lie below it.
        """
        read = (seed != 0).flatten(2).any(-1).any(0)
        at_root = [share(x[:, read], seed[:, read]) for x in (root, reference)]
        expected, above = per_example(at_root[0] - at_root[1]), "the target"
        size = per_example(at_root[0].abs() + at_root[1].abs())
        dtype, cuts = root.dtype, [c for c in self._anatomy.stacks.cuts if set(self._names(c)) <= set(self._through) & set(below)]
        for cut in reversed(cuts):
            expected = expected - self._stays.get(cut.row, torch.zeros_like(expected))
            names = self._names(cut)
            found, sizes = (torch.stack([values[name] for name in names]).sum(0) for values in (self._through, self._sizes))
            gap = (found - expected).abs() / (size + sizes).clamp(min=1e-30)
            worst = int(gap.nan_to_num(posinf=1.0).argmax())
            if not float(gap[worst]) <= _TOLERANCE[dtype]:
                raise MismatchError(
                    f"the relevance of a pair of runs does not add up: between {above} and {', '.join(cut.names)} it changes from "
                    f"{float(expected[worst]):.6g} to {float(found[worst]):.6g}. A component there computes something that its site does "
                    "not say, or another thing in one of the two runs, or a rule of your own is not as exact as it says; audit=True with "
                    "check=False shows what is left unexplained where"
                )
            above = ", ".join(cut.names)

    @property
    def _rows(self) -> list[str]:
        rows = [cut.row for cut in self._anatomy.stacks.cuts]
        return rows if "output" in rows else [*rows, "output"]

    def _names(self, cut: Cut) -> list[str]:
        """What flows through a cut; with the embeddings of tokens go those of positions, which are added to them."""
        return [*cut.names, *self._beside] if cut.row == "embed" else list(cut.names)

    def _stay(self, row: str, kept: Tensor) -> None:
        self._stays[row] = self._stays[row] + kept if row in self._stays else kept


def from_lowest(tensors: Mapping[str, Tensor], asked: Sequence[str]) -> dict[str, Tensor]:
    """The tensors, in the order in which they fired, from the first one that was asked for: the backward goes no deeper for a check."""
    names = list(tensors)
    first = next((i for i, name in enumerate(names) if name in set(asked)), 0)
    return {name: tensors[name] for name in names[first:]}
