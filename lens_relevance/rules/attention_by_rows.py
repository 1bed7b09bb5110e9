"""Attention as one operation, computed for some query rows at a time: memory for rows x keys instead of queries x keys.

The three steps and their rules are those of `attention` and `softmax`; each sees some query rows and the keys that these can see. A
rule passes the steps of some rows as it passes those of all, since the rows of a pattern do not depend on each other. Sums over queries, at
the keys and values, are taken piece by piece, so that results equal those at once up to rounding, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from lens_relevance.memory.trial import piece
from lens_relevance.rules.attention import AttentionGeometry, CappedScoresRule, Mix, Scores
from lens_relevance.rules.base import Coefficients, Kept, Operation, Reference, Rule, Tensors, working
from lens_relevance.rules.product import ConstantFirstFactor, PairProduct, Product
from lens_relevance.rules.softmax import PairSoftmax, Softmax, SoftmaxTemperature

ROWS = 128  # enough for full speed: more rows no longer fit into a processor's cache
ENTRIES = 2**24  # of the scores of these rows, at most: 64 MiB in fp32

Masked = Callable[[Float[Tensor, "batch head row key"], slice, slice], Tensor]
Visible = Callable[[slice], slice]


def rows_at_once(batch: int, heads: int, queries: int) -> int:
    """How many query rows are computed at a time."""
    return max(1, min(ROWS, ENTRIES // (batch * heads * queries)))


class AttentionByRows(Operation):
    """(q, k[, rotary constants], v) -> z.

    Attributes:
        geometry: Of the raw tensors.
        softmax: With the model's sinks.
        masked: From the scores of these rows and keys to the same as the model masks them.
        visible: The keys that any of these rows sees.
    """

    kind = "attention"
    column = "product"

    def __init__(self, geometry: AttentionGeometry, softmax: Softmax, masked: Masked, visible: Visible) -> None:
        self.geometry, self.softmax, self.masked, self.visible = geometry, softmax, masked, visible
        n, d = geometry.n_heads, geometry.d_head
        self.by_head = AttentionGeometry(
            n,
            n,
            d,
            scale=geometry.scale,
            soft_cap=geometry.soft_cap,
            queries_are_split=True,
            values_are_split=True,
            d_value=geometry.d_value,
        )
        self.scores, self.mix = Scores(self.by_head), Mix(self.by_head)

    def heads(self, inputs: Tensors) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as they meet, [batch, head, pos, d], keys and values repeated for their group of query heads."""
        q, k = self.geometry.queries_keys(inputs[:-1])
        return q, self.geometry.expand(k), self.geometry.expand(self.geometry.values(inputs[-1]))

    def raw(self, q: Tensor, k: Tensor, v: Tensor, constants: Tensors) -> Coefficients:
        """Coefficients at q, k and v by head as those of the raw tensors."""
        geometry = self.geometry
        k, v = geometry.reduce(k), geometry.reduce(v)
        if geometry.rotate is not None:
            q, k = geometry.rotate(q, -1, constants), geometry.rotate(k, -1, constants)
        if not geometry.queries_are_split:
            q, k = geometry.merge(q), geometry.merge(k)
        return q, k, *(None for _ in constants), v if geometry.values_are_split else geometry.merge(v)

    def pieces(self, q: Tensor) -> Iterator[tuple[slice, slice]]:
        """Query rows, some at a time, and the keys that these see."""
        batch, heads, queries = q.shape[:-1]
        size = rows_at_once(batch, heads, queries)
        for start in range(0, queries, size):
            rows = slice(start, min(start + size, queries))
            with piece():
                yield rows, self.visible(rows)

    def steps(self, q: Tensor, k: Tensor, rows: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Scores and pattern of these rows."""
        scores = self.masked(self.scores(q[..., rows, :], k[..., keys, :]), rows, keys)
        return scores, self.softmax(scores)

    def __call__(self, *inputs: Float[Tensor, "*_hook"]) -> Float[Tensor, "*_output"]:
        q, k, v = self.heads(inputs)
        return torch.cat([self.mix(self.steps(q, k, rows, keys)[1], v[..., keys, :]) for rows, keys in self.pieces(q)], -2)

    def to_keys(self, inputs: Tensors, keys: slice) -> Tensor:
        """What z would be if there were these keys alone."""
        q, k, v = self.heads(inputs)
        return self.mix(self.steps(q, k, slice(0, q.shape[-2]), keys)[1], v[..., keys, :])


class AttentionByRowsRule(Rule):
    """How relevance passes z, the pattern and the scores, for some query rows at a time."""

    def __init__(self, scores: Rule, pattern: Rule, z: Rule) -> None:
        self.scores, self.pattern, self.z = scores, pattern, z

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        return any(rule.needs_reference for rule in (self.scores, self.pattern, self.z))

    @property
    def is_exact(self) -> bool:
        return all(rule.is_exact for rule in (self.scores, self.pattern, self.z))

    def keep(self, op: Operation, inputs: Tensors, output: Float[Tensor, "*_output"], reference: Reference | None) -> Tensors:
        return (*inputs, output) if reference is None else (*inputs, output, *reference.inputs, reference.output)

    def backward(self, op: Operation, kept: Kept, upstream: Float[Tensor, "*_output"]) -> Coefficients:
        assert isinstance(op, AttentionByRows)
        n = len(kept) // 2 if self.needs_reference else len(kept)
        (*inputs, output), others = kept[:n], kept[n:]
        q, k, v = op.heads(tuple(inputs))
        q2, k2, v2 = op.heads(tuple(others[:-1])) if others else (None, None, None)
        to_q, to_k, to_v = (torch.zeros_like(x) for x in (q, k, v))
        for rows, keys in op.pieces(q):
            mine = q[..., rows, :], k[..., keys, :], v[..., keys, :]
            scores, pattern = op.steps(q, k, rows, keys)
            at_scores = at_pattern = at_z = None
            if q2 is not None and k2 is not None and v2 is not None:
                scores2, pattern2 = op.steps(q2, k2, rows, keys)
                at_z = Reference((pattern2, v2[..., keys, :]), others[-1][..., rows, :])
                at_pattern, at_scores = Reference((scores2,), pattern2), Reference((q2[..., rows, :], k2[..., keys, :]), scores2)
            g, g_v = _through(self.z, op.mix, (pattern, mine[2]), output[..., rows, :], at_z, working(upstream[..., rows, :]))
            (g,) = _through(self.pattern, op.softmax, (scores,), pattern, at_pattern, g)
            g_q, g_k = _through(self.scores, op.scores, mine[:2], scores, at_scores, g)
            to_q[..., rows, :] = g_q
            to_k[..., keys, :] += g_k
            to_v[..., keys, :] += g_v
        return op.raw(to_q, to_k, to_v, tuple(inputs[2:-1]))


def passes_by_rows(rule: Rule) -> bool:
    """Whether a rule of scores, pattern or z passes some query rows as it passes all of them. Of a user's own rule that is not known."""
    if isinstance(rule, CappedScoresRule):
        return passes_by_rows(rule.product)
    return rule.is_plain or type(rule).on_output or type(rule) in (ConstantFirstFactor, PairProduct, PairSoftmax, SoftmaxTemperature)


def _through(
    rule: Rule, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None, upstream: Tensor
) -> tuple[Tensor, ...]:
    """Coefficients at the inputs of a step."""
    found: Coefficients
    if not (rule.is_plain or rule.on_output):
        found = rule.backward(op, rule.keep(op, inputs, output, reference if rule.needs_reference else None), upstream)
    else:
        scaled = upstream if rule.is_plain else rule.backward(op, (), upstream)[0]
        assert scaled is not None
        found = _gradient(op, inputs, output, scaled)
    return tuple(torch.zeros_like(x) if c is None else c for x, c in zip(inputs, found, strict=True))


def _gradient(op: Operation, inputs: Tensors, output: Tensor, upstream: Tensor) -> Coefficients:
    """The plain gradient of a step, from what is at hand where it has a closed form."""
    if isinstance(op, Softmax):
        return (output * (upstream - (output * upstream).sum(-1, keepdim=True)),)
    if isinstance(op, Product) and op.is_bare:
        first, second = op.operands(inputs)
        return op.back(upstream, second, first, ())
    return op.gradient(inputs, upstream)
