"""Attention by rows against the three steps at once, each with its rule, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lens_relevance.rules import (
    AttentionGeometry,
    CappedScoresRule,
    ConstantFirstFactor,
    ConstantOutput,
    Half,
    Identity,
    Mix,
    PairProduct,
    PairSoftmax,
    Reference,
    Rescale,
    Rule,
    Scores,
    Softmax,
    SoftmaxTemperature,
)
from lens_relevance.rules import attention_by_rows as module
from lens_relevance.rules.attention_by_rows import AttentionByRows, AttentionByRowsRule
from tests.engine.families import close

D = 4
PLAIN = Rule()
RULES: dict[str, tuple[Rule, Rule, Rule]] = {
    "gradient": (PLAIN, PLAIN, PLAIN),
    "half": (Half, PLAIN, Half),
    "constant pattern": (PLAIN, ConstantOutput, PLAIN),
    "temperature": (Half, SoftmaxTemperature(2.0), Half),
    "constant first factor": (ConstantFirstFactor(), PLAIN, ConstantFirstFactor()),
    "pair": (PairProduct(), PairSoftmax(), PairProduct()),
    "pair in part": (Half, PairSoftmax(), Half),
}
CAPS: dict[str, Rule] = {"pair": Rescale(), "gradient": PLAIN}
NOTHING_PASSES = ("constant pattern", "constant first factor")


@dataclass(frozen=True)
class Form:
    """The shape of an attention. window: keys that a query sees, itself among them; padded: positions hidden at the left of row 0."""

    batch: int
    heads: int
    group: int
    positions: int
    rows: int
    window: int
    padded: int
    split: bool
    rotated: bool
    soft_cap: float | None
    with_sinks: bool

    @property
    def key_value_heads(self) -> int:
        return self.heads // self.group

    def geometry(self) -> AttentionGeometry:
        def rotate(x: Tensor, sign: int, constants: tuple[Tensor, ...]) -> Tensor:
            cos, sin = (c.unsqueeze(1) for c in constants)
            first, second, rest = x[..., :1], x[..., 1:2], x[..., 2:]
            return torch.cat([first * cos - sign * second * sin, second * cos + sign * first * sin, rest], -1)

        return AttentionGeometry(
            self.heads,
            self.key_value_heads,
            D,
            scale=0.7,
            soft_cap=self.soft_cap,
            rotate=rotate if self.rotated else None,
            queries_are_split=self.split,
        )

    def mask(self) -> Tensor:
        queries, keys = torch.arange(self.positions).unsqueeze(1), torch.arange(self.positions)
        seen = ((keys <= queries) & (keys > queries - self.window)).expand(self.batch, 1, -1, -1).clone()
        seen[0, :, :, : self.padded] = False
        return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)

    def inputs(self, seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        angles = draw(self.batch, self.positions, 1)
        constants = (angles.cos(), angles.sin()) if self.rotated else ()
        v = draw(self.batch, self.positions, self.key_value_heads * D)
        if self.split:
            shapes = ((self.batch, heads, self.positions, D) for heads in (self.heads, self.key_value_heads))
        else:
            shapes = ((self.batch, self.positions, heads * D) for heads in (self.heads, self.key_value_heads))
        q, k = (draw(*shape) for shape in shapes)
        return q, k, *constants, v


@st.composite
def forms(draw: st.DrawFn) -> Form:
    group, positions, split = draw(st.sampled_from((1, 2, 3))), draw(st.integers(2, 12)), draw(st.booleans())
    return Form(
        batch=draw(st.integers(1, 2)),
        heads=group * draw(st.integers(1, 2)),
        group=group,
        positions=positions,
        rows=draw(st.integers(1, positions)),
        window=draw(st.integers(1, positions)),
        padded=draw(st.integers(0, positions - 1)),
        split=split,
        rotated=draw(st.booleans()) and not split,
        soft_cap=draw(st.sampled_from((None, 1.5))),
        with_sinks=draw(st.booleans()),
    )


def _by_rows(form: Form, softmax: Softmax, visited: list[int]) -> AttentionByRows:
    mask = form.mask()

    def visible(rows: slice) -> slice:
        visited.append(rows.stop - rows.start)
        seen = mask[:, :, rows] == 0
        if not bool(seen.any(-1).all()):
            return slice(0, form.positions)
        keys = seen.flatten(0, 2).any(0).nonzero()
        return slice(int(keys[0]), int(keys[-1]) + 1)

    return AttentionByRows(form.geometry(), softmax, lambda scores, rows, keys: scores + mask[..., rows, keys], visible)


def _through(
    rule: Rule, op: Scores | Softmax | Mix, inputs: tuple[Tensor, ...], output: Tensor, *, other: Reference, upstream: Tensor
) -> list[Tensor | None]:
    """Coefficients at the inputs of a step that is taken at once."""
    if rule.is_plain:
        return list(op.gradient(inputs, upstream))
    if rule.on_output:
        (scaled,) = rule.backward(op, (), upstream)
        assert scaled is not None
        return list(op.gradient(inputs, scaled))
    return list(rule.backward(op, rule.keep(op, inputs, output, other), upstream))


@settings(max_examples=150, deadline=None)
@given(form=forms(), rules=st.sampled_from(sorted(RULES)))
def test_values_and_coefficients_are_those_of_the_three_steps(form: Form, rules: str) -> None:
    geometry, mask = form.geometry(), form.mask()
    sinks = torch.linspace(-1.0, 0.8, form.heads, dtype=torch.float64) if form.with_sinks else None
    scores, softmax, mix, visited = Scores(geometry), Softmax(sinks), Mix(geometry), list[int]()
    of_scores, of_pattern, of_z = RULES[rules]
    if form.soft_cap is not None:
        of_scores = scores.compose({"scores": of_scores, "soft_cap": CAPS.get(rules, Identity())})
        assert isinstance(of_scores, CappedScoresRule) == (rules != "gradient")
    operation, rule = _by_rows(form, softmax, visited), AttentionByRowsRule(of_scores, of_pattern, of_z)

    def at_once(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        s = scores(*inputs[:-1]) + mask
        p = softmax(s)
        return s, p, mix(p, inputs[-1])

    one, two = form.inputs(1), form.inputs(2)
    (s1, p1, z1), (s2, p2, z2) = at_once(one), at_once(two)
    upstream = torch.randn(z1.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    to_pattern, to_v = _through(of_z, mix, (p1, one[-1]), z1, other=Reference((p2, two[-1]), z2), upstream=upstream)
    assert to_pattern is not None
    (to_scores,) = _through(of_pattern, softmax, (s1,), p1, other=Reference((s2,), p2), upstream=to_pattern)
    assert to_scores is not None
    to_q, to_k, *_ = _through(of_scores, scores, one[:-1], s1, other=Reference(two[:-1], s2), upstream=to_scores)

    with mock.patch.object(module, "ROWS", form.rows):
        close(operation(*one), z1, 1e-14)
        assert sum(visited) == form.positions and max(visited) == form.rows
        kept = rule.keep(operation, one, z1, Reference(two, z2) if rule.needs_reference else None)
        found = rule.backward(operation, kept, upstream)
    assert found[2:-1] == tuple(None for _ in one[2:-1])
    largest = max(float(x.abs().max()) for x in (to_q, to_k, to_v) if x is not None)
    assert largest > 0
    for actual, expected in zip((found[0], found[1], found[-1]), (to_q, to_k, to_v), strict=True):
        assert actual is not None and expected is not None
        assert actual.shape == expected.shape
        assert float((actual - expected).abs().max()) <= 1e-13 * largest
    if rules in NOTHING_PASSES:
        assert found[0] is not None and not bool(found[0].any())
