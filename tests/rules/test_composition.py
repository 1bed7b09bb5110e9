"""Rules compose: every rule in a table is called wherever its step occurs, alone or fused with others, or is refused with a reason.

Each case runs a tiny real model and takes the coefficients at an operation's output from the run. What the coefficients at its inputs have
to be is then computed from those, the activations and the weights alone, as the gradient of a surrogate: a product written as
a * (what stands for b) + b * (what stands for a) and a function written as x * slope, with everything but a, b and x held fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from lens_relevance import RelevanceCache, RelevanceError, logit_diff, propagate, rulesets
from lens_relevance.rules import (
    ConstantFirstFactor,
    ElementwiseRule,
    Experts,
    GatedActivation,
    GatedRule,
    Half,
    Identity,
    KnownFunction,
    LNRule,
    Operation,
    PairNorm,
    PairProduct,
    PairSoftmax,
    ProductRule,
    Reference,
    Rescale,
    Rule,
    Scale,
    Scores,
    SoftmaxTemperature,
)
from lens_relevance.rules.activation import derivative, rescale_factor
from lens_relevance.rules.base import Coefficients, Place, Tensors
from lens_relevance.rules.softmax import logarithmic_mean
from lens_relevance.sites import anatomy
from tests.engine.families import TARGET, build, inputs_and_reference, unexplained
from tests.precision import no_upcasts
from tests.rules.dense import near, normal
from tests.wider_models import build_wider

TOKENS, OTHER = inputs_and_reference()
MIXTURES = ("mixtral", "gpt_oss", "deepseek_v3")
SCALES = (0.0, 1e-6, 0.3, 0.5, 1.0)


# Rules of one's own. Nothing about them is linear or symmetric, so that no mistake cancels.


class Wave(ElementwiseRule):
    """cos(x) + f(x)."""

    def slope(self, f: KnownFunction, x: Tensor, other: Tensor | None) -> Tensor:
        assert other is None
        return x.cos() + f(x)


class WaveBetween(ElementwiseRule):
    """cos(x) + f(x') x', between two runs."""

    needs_reference = True

    def slope(self, f: KnownFunction, x: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        return x.cos() + f(other) * other


class Lopsided(ProductRule):
    """sin(b) for b and a^2 for a."""

    def factors(self, a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> tuple[Tensor, Tensor]:
        assert other_a is None and other_b is None
        return b.sin(), a.square()


class LopsidedLinear(ProductRule):
    """0.2 b and 3 a."""

    factors_linear = True

    def factors(self, a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> tuple[Tensor, Tensor]:
        return 0.2 * b, 3 * a


class LopsidedBetween(ProductRule):
    """b^2 - 2 b' and sin(a'), between two runs."""

    needs_reference = True

    def factors(self, a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> tuple[Tensor, Tensor]:
        assert other_a is not None and other_b is not None
        return b.square() - 2 * other_b, other_a.sin()


class OnlyFirst(ProductRule):
    """b for b, and nothing to the second factor."""

    def factors(self, a: Tensor, b: Tensor, other_a: Tensor | None, other_b: Tensor | None) -> tuple[Tensor, None]:
        return b, None


class Damped(Rule):
    """The gradient at the output times the tanh of the first input's mean, with nothing but `keep` and `backward`."""

    def keep(self, op: Operation, inputs: Tensors, output: Tensor, reference: Reference | None) -> Tensors:
        return (*inputs, inputs[0].nan_to_num(0, 0, 0).mean().tanh())

    def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
        return op.gradient(tuple(kept[:-1]), upstream * kept[-1])


ELEMENTWISE = [Wave(), WaveBetween(), Identity(), Rescale(), *(Scale(f) for f in SCALES)]
PRODUCTS = [Lopsided(), LopsidedLinear(), LopsidedBetween(), OnlyFirst(), ConstantFirstFactor(), PairProduct(), *(Scale(f) for f in SCALES)]


def slope(rule: Rule, f: Callable[[Tensor], Tensor], x: Tensor, other: Tensor) -> Tensor:
    """The slope that a rule's definition gives."""
    if isinstance(rule, Scale):
        return rule.factor * derivative(f, x)
    return {
        Wave: lambda: x.cos() + f(x),
        WaveBetween: lambda: x.cos() + f(other) * other,
        Identity: lambda: f(x) / x,
        Rescale: lambda: rescale_factor(f, x, f(x), x2=other, y2=f(other)),
        Rule: lambda: derivative(f, x),
    }[type(rule)]()


def factors(rule: Rule, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What stands for b and for a by a rule's definition."""
    if isinstance(rule, Scale):
        return rule.factor * b, rule.factor * a
    return {
        Lopsided: lambda: (b.sin(), a**2),
        LopsidedLinear: lambda: (0.2 * b, 3 * a),
        LopsidedBetween: lambda: (b**2 - 2 * b2, a2.sin()),
        OnlyFirst: lambda: (b, 0.0),
        ConstantFirstFactor: lambda: (0.0, a),
        PairProduct: lambda: ((b + b2) / 2, (a + a2) / 2),
        Rule: lambda: (b, a),
    }[type(rule)]()


Pair = tuple[Tensor, Tensor]


def passed(rule: Rule, f: Callable[[Tensor], Tensor], x: Pair) -> Pair:
    """f of both runs; the first one with the rule's gradient in place of its own."""
    y, fixed = f(x[0]).detach(), slope(rule, f, x[0].detach(), x[1]).detach()
    return y + (x[0] - x[0].detach()) * fixed, f(x[1])


def multiplied(rule: Rule, a: Pair, b: Pair, times: Callable[[Any, Any], Tensor] = torch.mul) -> Pair:
    """A product of both runs; the first one with the rule's gradient."""
    for_b, for_a = factors(rule, a[0].detach(), b[0].detach(), a[1], b[1])
    y = times(a[0].detach(), b[0].detach())
    return y + _part(times, a[0] - a[0].detach(), for_b) + _part(times, for_a, b[0] - b[0].detach()), times(a[1], b[1])


def _part(times: Callable[[Any, Any], Tensor], one: Any, two: Any) -> Tensor | float:
    return 0.0 if isinstance(one, float) or isinstance(two, float) else times(one, two)


class Case:
    """One operation of a model under a table: what came out of the run, in both runs, and the surrogate's gradient to hold against it."""

    def __init__(self, model: Any, table: dict[str, Rule], output: str) -> None:
        with no_upcasts():
            self.cache = propagate(model, TOKENS, TARGET, rules=table, names_filter=lambda _: True, reference=OTHER, audit=True)
            assert torch.equal(self.cache.logits, model(TOKENS))
        assert unexplained(self.cache) < 1e-9
        self.upstream = self.cache.coefficients[output]
        self.leaves: dict[str, Tensor] = {}

    def at(self, name: str) -> Pair:
        self.leaves[name] = self.cache.activations[name].clone().requires_grad_(True)
        return self.leaves[name], self.cache.reference_activations[name]

    def check(self, value: Pair, tolerance: float = 1e-9) -> None:
        """The coefficients at all inputs are the surrogate's; both may be zero, where a rule says so."""
        expected = torch.autograd.grad(value[0], list(self.leaves.values()), self.upstream, allow_unused=True)
        for name, want in zip(self.leaves, expected, strict=True):
            got = self.cache.coefficients[name]
            want = torch.zeros_like(got) if want is None else want
            if float(want.abs().max()) == 0:
                assert float(got.abs().max()) == 0
            else:
                near(got, want.nan_to_num(0.0), tolerance)


@cache
def model_of(family: str) -> Any:
    """A tiny random model in float64, built once: a run leaves it as it was."""
    return build_wider(family) if family in MIXTURES else build(family)


def gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("rule", ELEMENTWISE, ids=repr)
def test_on_the_activation_of_a_plain_mlp(rule: Rule) -> None:
    case = Case(model_of("gpt2"), {"activation": rule}, "blocks.1.mlp.out.hook_in")
    case.check(passed(rule, gelu, case.at("blocks.1.mlp.in.hook_out")))


@pytest.mark.parametrize("activation, gate", [*product(ELEMENTWISE, [Rule(), Lopsided()]), *product([Rule(), Wave()], PRODUCTS)], ids=repr)
def test_on_a_gated_mlp(activation: Rule, gate: Rule) -> None:
    case = Case(model_of("llama"), {"activation": activation, "gate": gate}, "blocks.1.mlp.out.hook_in")
    act = passed(activation, silu, case.at("blocks.1.mlp.gate.hook_out"))
    case.check(multiplied(gate, act, case.at("blocks.1.mlp.in.hook_out")))


def mixture(op: Experts, x: Pair, table: dict[str, Rule]) -> Pair:
    """A mixture of experts in both runs, token by token in plain torch, with surrogates for its three rules."""
    tokens = tuple(run.flatten(0, 1) for run in x)
    choice = [op.router.choose(run.detach()) for run in tokens]
    scores = tuple(run @ op.router.weight.T + (0 if op.router.bias is None else op.router.bias) for run in tokens)
    chosen = [torch.zeros_like(s, dtype=torch.bool).scatter(1, c, True) for s, c in zip(scores, choice, strict=True)]
    between = table["router"].needs_reference
    weights = _router_weights(op, (scores[0], scores[1]), chosen, between)
    rows = torch.zeros_like(tokens[0])
    for e in range(op.n):
        y = _expert(op, op.expert(e), (tokens[0], tokens[1]), table)
        w = weights[0][:, e : e + 1], weights[1][:, e : e + 1]
        value = multiplied(table["router"], w, y)[0]
        used = chosen[0][:, e] | (chosen[1][:, e] if between else False)
        rows = rows + torch.where(used.unsqueeze(1), value, torch.zeros_like(value))
    if op.shared is not None:
        rows = rows + _expert(op, op.shared, (tokens[0], tokens[1]), table)[0]
    return rows.reshape(x[0].shape), x[1]


def _router_weights(op: Experts, scores: Pair, chosen: list[Tensor], between: bool) -> Pair:
    """Softmax over the chosen (or all) experts by its Jacobian, or by the pair form where both runs chose alike."""
    logits = [logsigmoid(s) if op.router.sigmoid else s for s in scores]
    if not op.router.over_all:
        logits = [s.masked_fill(~c, float("-inf")) for s, c in zip(logits, chosen, strict=True)]
    weights = [op.router.scale * s.softmax(-1) * c for s, c in zip(logits, chosen, strict=True)]
    if not between:
        return weights[0], weights[1]
    same = (chosen[0] == chosen[1]).all(-1, keepdim=True)
    one, two = (s.detach().masked_fill(~same, 0.0) for s in logits)
    mean = logarithmic_mean(one, two) * same
    steps = scores[0] - scores[0].detach()
    if op.router.sigmoid:
        s1, s2 = scores[0].detach(), scores[1]
        steps = steps * rescale_factor(logsigmoid, s1, logsigmoid(s1), x2=s2, y2=logsigmoid(s2))
    jacobian = torch.diag_embed(mean) - mean.unsqueeze(2) * mean.unsqueeze(1) / mean.sum(-1).clamp(min=1e-300)[:, None, None]
    return weights[0].detach() + op.router.scale * torch.einsum("nij,nj->ni", jacobian, steps), weights[1]


def _expert(op: Experts, expert: Any, x: Pair, table: dict[str, Rule]) -> Pair:
    def linear(weight: Tensor, bias: Tensor | None, runs: Pair) -> Pair:
        one, two = (run @ weight.T + (0 if bias is None else bias) for run in runs)
        return one, two

    gate, up = linear(expert.gate, expert.gate_bias, x), linear(expert.up, expert.up_bias, x)
    clamp: Callable[[Tensor], Tensor] | None = getattr(op.gated, "clamp", None)
    act = passed(table["activation"], op.gated.function, gate)
    neurons = multiplied(table["gate"], act, up if clamp is None else passed(table["activation"], clamp, up))
    if clamp is not None:
        neurons = neurons[0] + act[0], neurons[1] + act[1]
    return linear(expert.down, expert.down_bias, neurons)


MIXED = [
    *({"activation": a, "gate": Rule(), "router": Rule()} for a in ELEMENTWISE),
    *({"activation": Wave(), "gate": p, "router": Rule()} for p in PRODUCTS),
    *({"activation": Rule(), "gate": Half, "router": p} for p in PRODUCTS),
    {"activation": Wave(), "gate": Lopsided(), "router": LopsidedBetween()},
]


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("table", MIXED, ids=lambda t: "-".join(repr(rule) for rule in t.values()))
def test_on_experts_clamped_gates_and_routers(family: str, table: dict[str, Rule]) -> None:
    model = model_of(family)
    case = Case(model, table, "blocks.1.mlp.hook_out")
    operation = next(s.operation for s in anatomy(model).sites if s.name == "blocks.1.mlp")
    assert isinstance(operation, Experts)
    case.check(mixture(operation, case.at("blocks.1.mlp.hook_in"), table))


def dot(one: Tensor, two: Tensor) -> Tensor:
    return torch.einsum("bhtd,bhsd->bhts", one, two)


def weighted(one: Tensor, two: Tensor) -> Tensor:
    return torch.einsum("bhts,bhsd->bhtd", one, two)


@pytest.mark.parametrize("rule", [r for r in PRODUCTS if not isinstance(r, Lopsided)] + [Lopsided()], ids=repr)
def test_on_scores_and_z(rule: Rule) -> None:
    for key, points, output, times in (
        ("scores", ("q.hook_out", "k.hook_out"), "hook_attn_scores", dot),
        ("z", ("hook_pattern", "v.hook_out"), "hook_z", weighted),
    ):
        case = Case(model_of("gpt2"), {key: rule}, f"blocks.0.attn.{output}" if key == "scores" else "blocks.0.attn.o.hook_in")
        a, b = (case.at(f"blocks.0.attn.{point}") for point in points)
        by_head = [tuple(x.transpose(1, 2) for x in pair) for pair in ((a, b) if key == "scores" else (b,))]
        first, second = (by_head[0], by_head[1]) if key == "scores" else (a, by_head[0])
        value = multiplied(rule, (first[0], first[1]), (second[0], second[1]), times)[0]
        case.check((value * 0.5 if key == "scores" else value.transpose(1, 2), value))  # scale of the scores: d_head 4


@pytest.mark.parametrize("scores, cap", [*product([Rule(), Lopsided(), Half], ELEMENTWISE), *product(PRODUCTS, [Rule(), Wave()])], ids=repr)
def test_on_scores_with_a_soft_cap(scores: Rule, cap: Rule) -> None:
    """The soft-cap's rule sees scores in units of the cap."""
    model = model_of("gemma2")
    case = Case(model, {"scores": scores, "soft_cap": cap}, "blocks.1.attn.hook_attn_scores")
    operation = next(s.operation for s in anatomy(model).sites if s.name == "blocks.1.attn:scores")
    assert isinstance(operation, Scores) and operation.geometry.soft_cap == 2.0
    q, k = ([x.transpose(1, 2) for x in case.at(f"blocks.1.attn.hook_rot_{name}")] for name in "qk")
    wide = k[0].repeat_interleave(2, 1), k[1].repeat_interleave(2, 1)
    raw = multiplied(scores, (q[0], q[1]), wide, dot)
    scaled = raw[0] * (operation.geometry.scale / 2), raw[1] * (operation.geometry.scale / 2)
    value = passed(cap, torch.tanh, scaled)
    case.check((value[0] * 2, value[1]))


@pytest.mark.parametrize("rule", ELEMENTWISE, ids=repr)
def test_on_the_soft_cap_of_logits(rule: Rule) -> None:
    model = model_of("gemma2")
    cache = propagate(model, TOKENS, TARGET, rules={"soft_cap": rule}, names_filter="unembed.hook_out", reference=OTHER, audit=True)
    assert unexplained(cache) < 1e-4
    x, other = cache.activations["unembed.hook_out"], cache.reference_activations["unembed.hook_out"]
    seed = torch.zeros_like(x)
    seed[:, -1, 7], seed[:, -1, 11] = 1, -1
    want = seed * slope(rule, lambda t: 4 * torch.tanh(t / 4), x, other)
    got = cache.coefficients["unembed.hook_out"]
    assert torch.allclose(got, want, rtol=1e-9, atol=0)
    assert bool((got[:, -1, 7] != 0).all()) == (rule.holds_output is False)


SINGLE = [
    ("norm@ln1", "gpt2", "blocks.1.ln1.hook_in", "blocks.1.ln1.hook_out", "blocks.1.ln1"),
    ("norm@ln2", "llama", "blocks.1.ln2.hook_in", "blocks.1.ln2.hook_out", "blocks.1.ln2"),
    ("pattern", "gpt2", "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.attn:pattern"),
    ("linear@in", "gpt2", "blocks.1.mlp.in.hook_in", "blocks.1.mlp.in.hook_out", "blocks.1.mlp.in"),
    ("activation", "gpt2", "blocks.1.mlp.in.hook_out", "blocks.1.mlp.out.hook_in", "blocks.1.mlp"),
]


@pytest.mark.parametrize("rule", [Damped(), *(Scale(f) for f in SCALES)], ids=repr)
@pytest.mark.parametrize("key, family, hook_in, hook_out, name", SINGLE, ids=[f"{c[0]}-{c[1]}" for c in SINGLE])
def test_on_an_operation_that_stands_alone(rule: Rule, key: str, family: str, hook_in: str, hook_out: str, name: str) -> None:
    """The gradient of the operation, from its own HookPoints, times what the rule says."""
    model = model_of(family)
    case = Case(model, {key: rule}, hook_out)
    operation = next(s.operation for s in anatomy(model).sites if s.name == name)
    x = case.at(hook_in)
    by = rule.factor if isinstance(rule, Scale) else float(x[0].detach().nan_to_num(0, 0, 0).mean().tanh())
    y = operation(x[0])
    (gradient,) = torch.autograd.grad(y, x[0], case.upstream, retain_graph=True)
    case.check((y * by, x[1]))
    assert float(gradient.abs().max()) > 0


class Counted(Identity):
    """The identity rule in one layer, and the gradient elsewhere."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def at(self, place: Place) -> Rule:
        assert place.n_layers == 2 and place.name.startswith("blocks.") and place.mount == "mlp"
        return self if place.layer == self.layer else Rule()


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_a_rule_sees_where_it_sits(family: str) -> None:
    model = model_of(family)
    kept = {}
    for name, rule in {"both": Identity(), "neither": Rule(), "second": Counted(1)}.items():
        cache = propagate(model, TOKENS, TARGET, rules={"activation": rule, "gate": Half}, names_filter=lambda _: True, audit=True)
        assert unexplained(cache) < 1e-4
        kept[name] = cache.coefficients
    assert torch.equal(kept["second"]["blocks.1.mlp.hook_in"], kept["both"]["blocks.1.mlp.hook_in"])
    assert not torch.equal(kept["second"]["blocks.1.mlp.hook_in"], kept["neither"]["blocks.1.mlp.hook_in"])
    assert not torch.equal(kept["second"]["blocks.0.mlp.hook_in"], kept["both"]["blocks.0.mlp.hook_in"])


def test_a_rule_for_some_layers_says_that_it_compares_two_runs() -> None:
    class Late(Rule):
        def at(self, place: Place) -> Rule:
            return Rescale() if place.layer == 1 else Rule()

    with pytest.raises(RelevanceError, match="gives blocks.1.mlp Rescale.*needs_reference"):
        propagate(model_of("gpt2"), TOKENS, TARGET, rules={"activation": Late()})


# Rules that a step cannot take.

REFUSED: dict[str, tuple[str, dict[str, Rule], list[str]]] = {
    "keep and backward alone, for the activation of a gate": ("llama", {"activation": Damped()}, ["'activation'", "blocks.0.mlp", "slope"]),
    "the same for the product": ("llama", {"gate": Damped()}, ["'gate'", "blocks.0.mlp", "`factors`"]),
    "the same at one place": ("llama", {"gate@mlp": Damped()}, ["'gate@mlp'", "blocks.0.mlp", "`factors`"]),
    "the same for a router": ("mixtral", {"router": Damped()}, ["'router'", "blocks.0.mlp", "`factors`"]),
    "the same for experts": ("mixtral", {"activation": Damped()}, ["'activation'", "blocks.0.mlp", "`slope`"]),
    "the same for capped scores": ("gemma2", {"scores": Damped()}, ["'scores'", "blocks.0.attn:scores", "`factors`"]),
    "the same for their cap": ("gemma2", {"soft_cap": Damped()}, ["'soft_cap'", "blocks.0.attn:scores", "`slope`"]),
    "a softmax rule on a product": ("gpt2", {"z": PairSoftmax()}, ["'z'", "PairSoftmax", "ProductRule"]),
    "a softmax rule on scores": ("gpt2", {"scores": SoftmaxTemperature()}, ["'scores'", "SoftmaxTemperature", "ProductRule"]),
    "a product rule on a softmax": ("gpt2", {"pattern": PairProduct()}, ["'pattern'", "PairProduct", "SoftmaxRule"]),
    "a product rule on an activation": ("gpt2", {"activation": ConstantFirstFactor()}, ["'activation'", "ElementwiseRule", "`slope`"]),
    "an element-wise rule on a norm": ("gpt2", {"norm": Identity()}, ["'norm'", "Identity", "NormRule"]),
    "an element-wise rule on a router": ("mixtral", {"router": Wave()}, ["'router'", "Wave", "`factors`"]),
    "a norm rule on a linear layer": ("gpt2", {"linear": LNRule()}, ["'linear'", "LNRule", "LinearRule"]),
    "a norm rule on a gate": ("gpt2", {"gate": PairNorm()}, ["'gate'", "PairNorm", "ProductRule"]),  # before any gate is met
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_step_cannot_take_is_refused(what: str) -> None:
    family, table, words = REFUSED[what]
    model = model_of(family)
    with pytest.raises(RelevanceError) as raised:
        propagate(model, TOKENS, TARGET, rules=table, reference=OTHER)
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_a_rule_for_one_step_is_not_taken_for_the_whole() -> None:
    """Called by hand on scores with a soft-cap, a rule for products alone would leave the soft-cap out."""
    from tests.rules.test_attention import geometry, queries_keys

    operation = Scores(geometry(cap=0.8))
    with pytest.raises(RelevanceError, match="scores, soft_cap"):
        ConstantFirstFactor().keep(operation, queries_keys(2, 1), operation(*queries_keys(2, 1)), None)


def test_the_old_name_of_two_rules_names_both() -> None:
    with pytest.raises(ImportError, match=r"ConstantFirstFactor.*ConstantOutput"):
        from lens_relevance.rules import Constant  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(AttributeError):
        import lens_relevance.rules as rules

        rules.Constants  # noqa: B018


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation, gate", list(product(["gradient", "identity", "rescale"], ["gradient", "half", "constant", "pair"])))
def test_built_in_rules_on_gates_bit_by_bit(activation: str, gate: str, dtype: torch.dtype) -> None:
    """The factors as they were written out before rules composed: part * slope * up, part * act, means of two runs."""
    gates, ups = ((normal(3, 5, seed=i, dtype=dtype), normal(3, 5, seed=i + 1, dtype=dtype)) for i in (0, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    (gate1, gate2), (up1, up2) = ([x.to(wide) for x in pair] for pair in (gates, ups))
    act1, act2 = silu(gate1), silu(gate2)
    zero = gate1 == 0
    steepness = {
        "gradient": lambda: derivative(silu, gate1),
        "identity": lambda: torch.where(zero, 0.5, act1 / torch.where(zero, 1.0, gate1)),
        "rescale": lambda: rescale_factor(silu, gate1, act1, x2=gate2, y2=act2),
    }[activation]()
    expected = {
        "gradient": (1.0 * steepness * up1, 1.0 * act1),
        "half": (0.5 * steepness * up1, 0.5 * act1),
        "constant": (torch.zeros_like(gate1), act1),
        "pair": (steepness * ((up1 + up2) / 2), (act1 + act2) / 2),
    }[gate]
    rule = GatedRule(
        {"gradient": Scale(1.0), "identity": Identity(), "rescale": Rescale()}[activation],
        {"gradient": Scale(1.0), "half": Half, "constant": ConstantFirstFactor(), "pair": PairProduct()}[gate],
    )
    reference = Reference((gates[1], ups[1]), ups[1])
    got = rule.keep(GatedActivation(silu), (gates[0], ups[0]), silu(gates[0]) * ups[0], reference)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_a_known_function_computes_nothing_twice() -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x)
        return x.square()

    x, other = normal(4, seed=1), normal(4, seed=2)
    known = KnownFunction(f, (x, x.square()), (other, other.square().bfloat16()))
    assert torch.equal(known(x), x.square()) and known.unrounded(x) is known(x) and not calls
    assert torch.equal(known(other), other.square().bfloat16().float()) and not calls  # the model's own value, as rounded as it is
    assert torch.equal(known.unrounded(other), other.square()) and len(calls) == 1
    assert torch.equal(known(x + 1), (x + 1).square()) and len(calls) == 2


def test_what_a_cache_says_is_the_rules_doing() -> None:
    """The tables of this file change the result: no two rules of one's own give the same relevance."""
    seen: list[RelevanceCache] = []
    for rule in (Rule(), Wave(), Identity(), Scale(0.3), Scale(1e-6)):
        cache = propagate(model_of("llama"), TOKENS, TARGET, rules={"activation": rule, "gate": Half})
        assert not any(torch.allclose(cache.tokens(), other.tokens()) for other in seen)
        seen.append(cache)


def test_the_rule_of_the_notebook_holds_on_gates(stories: Any) -> None:
    """OnlyFiring, as notebook 5 writes it down, on a trained gated model."""
    notebook = nbformat.read(Path(__file__).parents[2] / "notebooks" / "5_your_own.ipynb", as_version=4)
    source = next(cell.source for cell in notebook.cells if "class OnlyFiring" in cell.source).split("\n\n\nfiring")[0]
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    table = {**rulesets()["attnlrp"], "activation": namespace["OnlyFiring"]()}
    prompt = "Once upon a time, there was a little girl named Lily. Lily was very happy because"
    cache = propagate(stories, prompt, logit_diff("she", "he"), rules=table, names_filter=lambda _: True, audit=True)
    assert unexplained(cache) < 1e-4
    for layer in range(5):
        gate, up = (cache.activations[f"blocks.{layer}.mlp.{name}.hook_out"] for name in ("gate", "in"))
        upstream = cache.coefficients[f"blocks.{layer}.mlp.out.hook_in"]
        assert 0.1 < float((gate > 0).float().mean()) < 0.9
        near(cache.coefficients[f"blocks.{layer}.mlp.gate.hook_out"], torch.where(gate > 0, upstream * up / 2 * gate.sigmoid(), 0.0), 1e-5)
