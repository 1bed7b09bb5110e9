"""Tables that say where: keys by place and by layers, which one holds where several match, and keys that match nothing."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lens_relevance import RelevanceError, attach, coverage, logit_diff, propagate, register_ruleset, rulesets
from lens_relevance.rules import EpsilonRule, GammaRule, Linear, LNRule, Rule, Scale, ZeroRule
from lens_relevance.ruleset_keys import check_keys, entry, read_key
from lens_relevance.ruleset_tables import rule_for
from lens_relevance.sites import anatomy
from tests.classifiers import build_classifier, inputs_for
from tests.encoder_decoders import build_encoder_decoder
from tests.engine.families import TARGET, build, close, inputs_and_reference, unexplained
from tests.engine.test_gamma import dense
from tests.models import build_gpt2, build_llama
from tests.precision import no_upcasts

TOKENS, OTHER = inputs_and_reference()


@cache
def deep(family: str = "gpt2") -> Any:
    """Six layers."""
    return {"gpt2": build_gpt2, "llama": build_llama}[family](dtype=torch.float64, n_layers=6)


@pytest.mark.parametrize(
    "text, part, place, layers",
    [
        ("norm", "norm", (), None),
        ("norm@q_norm", "norm", ("q_norm",), None),
        ("linear@mlp.in", "linear", ("mlp", "in"), None),
        ("activation[-1]", "activation", (), -1),
        ("soft_cap[3]", "soft_cap", (), 3),
        ("linear[0:4]", "linear", (), slice(0, 4)),
        ("linear[:]", "linear", (), slice(None)),
        ("linear@mlp.in[1::2]", "linear", ("mlp", "in"), slice(1, None, 2)),
        ("z@attn[-3:-1]", "z", ("attn",), slice(-3, -1)),
        ("linear@blocks.0.mlp.in", "linear", ("blocks", "0", "mlp", "in"), None),
    ],
)
def test_keys_are_read(text: str, part: str, place: tuple[str, ...], layers: int | slice | None) -> None:
    key = read_key(text)
    assert (key.part, key.place, key.layers) == (part, place, layers) and key.is_bare == (text == part)


@pytest.mark.parametrize(
    "text",
    ["linear@", "linear[", "linear[]", "linear[1:2:3:4]", "linear[a]", "linear[0:4]@mlp", "linear@mlp..in", "", "@mlp", "linear[::0]"],
)
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(RelevanceError, match="no key of a ruleset|step of a slice"):
        register_ruleset("of_a_wrong_key", {text: Rule()})
    assert "of_a_wrong_key" not in rulesets()


@pytest.mark.parametrize("layers", ["3", "-1", "-6", "0:4", "4:", "-2:", ":", "::2", "4:1:-1", "5:2"])
@pytest.mark.parametrize("place", ["", "@in", "@mlp.in", "@out", "@attn.q", "@gate"])
def test_a_key_is_for_what_python_would_index(place: str, layers: str) -> None:
    """Against the list of blocks, indexed by Python itself, and the path's last elements, taken by hand."""
    model = deep("llama")
    sites = [site for site in anatomy(model).sites if site.kind == "linear" and ":" not in site.name]
    blocks = eval(f"list(range(6))[{layers}]")
    blocks = [blocks] if isinstance(blocks, int) else blocks
    wanted = {f"blocks.{i}.{path}" for i in blocks for path in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.in", "mlp.out")}
    wanted = {name for name in wanted if ("." + name).endswith(place.replace("@", "."))}
    mine = GammaRule()
    table = {f"linear{place}[{layers}]": mine}
    assert {site.name for site in sites if rule_for(table, site) is mine} == wanted
    if wanted:
        check_keys(table, sites)
    else:
        with pytest.raises(RelevanceError, match="has 6 blocks, 0 to 5"):
            check_keys(table, sites)


def test_the_key_that_says_most_holds() -> None:
    site = next(site for site in anatomy(deep()).sites if site.name == "blocks.2.mlp.in")
    order = ["linear", "linear[:]", "linear[2:5]", "linear[2]", "linear@in", "linear@mlp.in", "linear@blocks.2.mlp.in"]
    order += ["linear@in[:]", "linear@in[-4]", "linear@mlp.in[:3]", "linear@mlp.in[2]"]
    rules = {key: GammaRule(float(i)) for i, key in enumerate(order)}
    for i in range(len(order)):
        for listed in (order[: i + 1], order[i::-1]):  # whichever comes first in the table
            assert entry({key: rules[key] for key in listed}, "linear", site) == order[i]
            assert rule_for({key: rules[key] for key in listed}, site) is rules[order[i]]


def test_two_keys_that_say_as_much_are_refused() -> None:
    table = {"linear[0:3]": GammaRule(0.1), "linear[2:5]": GammaRule(0.2)}
    with pytest.raises(RelevanceError, match=r"'linear\[0:3\]' and 'linear\[2:5\]' are both for blocks.2.attn.q.*linear@blocks.2.attn.q"):
        propagate(deep(), TOKENS, TARGET, rules=table)
    propagate(deep(), TOKENS, TARGET, rules={"linear[0:3]": GammaRule(0.1), "linear[3:5]": GammaRule(0.2)})


@pytest.mark.parametrize(
    "key, words",
    [
        ("linear@nonsense", ["'linear@in'", "'linear@q'", "'linear@unembed'"]),
        ("norm@q_norn", ["'norm@ln1'", "'norm@ln_final'"]),
        ("norm@ln_1", ["'norm@ln1'"]),
        ("linear@mlp_in", ["'linear@mlp.in'"]),
        ("norm@mlp.in", ["'linear@mlp.in'"]),
        ("activation@mlp[6]", ["6 blocks, 0 to 5"]),
        ("linear@mlp.in[6:9]", ["6 blocks, 0 to 5"]),
        ("linear@unembed[0]", ["'linear@unembed' is outside its blocks"]),
        ("router@mlp", ["no operation 'router'"]),
        ("gate[0]", ["no operation 'gate'"]),
    ],
)
def test_a_key_that_is_for_nothing_is_an_error_with_the_nearest_ones(key: str, words: list[str]) -> None:
    table = {**rulesets()["attnlrp"], key: Rule()}
    for use in (lambda: propagate(deep(), TOKENS, TARGET, rules=table), lambda: attach(deep(), table).__enter__()):
        with pytest.raises(RelevanceError) as raised:
            use()
        for word in (repr(key), *words):
            assert word in str(raised.value)


def test_a_bare_key_may_be_for_nothing() -> None:
    table = {**rulesets()["attnlrp"], "router": Rule(), "soft_cap": Rule(), "gate": Rule()}
    assert torch.equal(propagate(deep(), TOKENS, TARGET, rules=table).tokens(), propagate(deep(), TOKENS, TARGET, rules="attnlrp").tokens())


def relevance(table: dict[str, Rule]) -> Any:
    cache = propagate(deep(), TOKENS, TARGET, rules=table, names_filter=lambda _: True, audit=True)
    assert unexplained(cache) < 1e-9
    return cache


def linear_layers() -> list[tuple[str, Linear, str, str]]:
    sites = [site for site in anatomy(deep()).sites if isinstance(site.operation, Linear)]
    return [(site.name, site.operation, str(site.inputs[0].name), site.output_name) for site in sites]  # type: ignore[misc]


def flat(x: Tensor) -> Tensor:
    return x.flatten(2) if x.ndim == 4 else x


def absorbed(op: Linear, x: Tensor, y: Tensor, upstream: Tensor, epsilon: float) -> Tensor:
    """The epsilon rule, contribution by contribution."""
    return (x.unsqueeze(-2) * op.weight * (y * upstream / (y + epsilon * y.sign())).unsqueeze(-1)).sum(-2)


def test_a_composite_by_depth_and_kind() -> None:
    """The three lines of the documentation: every linear layer of six blocks against the dense formula of its own rule."""
    rules = {**rulesets()["attnlrp"], "linear@unembed": EpsilonRule(1e-3)}
    rules |= {"linear[:4]": GammaRule(0.25), "linear[4:]": EpsilonRule(1e-3)}
    rules |= {"linear@attn.q": ZeroRule(), "linear@attn.k": ZeroRule()}
    cache = relevance(rules)
    kinds = set()
    for name, op, hook_in, hook_out in linear_layers():
        x, y, g = (flat(t) for t in (cache.activations[hook_in], cache.activations[hook_out], cache.coefficients[hook_out]))
        layer = int(name.split(".")[1]) if name.startswith("blocks") else None
        kind = "plain" if name.endswith((".q", ".k")) else "gamma" if layer is not None and layer < 4 else "epsilon"
        kinds.add(kind)
        expected = {
            "plain": lambda: x * (g @ op.weight),  # noqa: B023 - used at once
            "gamma": lambda: dense(op, x, y, g, 0.25),  # noqa: B023
            "epsilon": lambda: absorbed(op, x, y, g, 1e-3),  # noqa: B023
        }[kind]()
        close(flat(cache[hook_in]), expected, 1e-9)
    assert kinds == {"plain", "gamma", "epsilon"}


def test_layers_choose_the_rule_of_one_step_of_a_fused_operation() -> None:
    model = deep("llama")
    with no_upcasts():
        mixed, plain, half = (
            propagate(model, TOKENS, TARGET, rules=table, names_filter=lambda _: True)
            for table in ({"gate[-1]": Scale(0.5)}, {"gate": Rule()}, {"gate": Scale(0.5)})
        )
    last, first = "blocks.5.mlp.hook_in", "blocks.0.mlp.hook_in"
    close(mixed.coefficients[last], half.coefficients[last], 1e-12)
    assert not torch.allclose(mixed.coefficients[last], plain.coefficients[last])
    assert not torch.allclose(mixed.coefficients[first], half.coefficients[first])


def test_each_stack_of_an_encoder_decoder_counts_its_own_blocks() -> None:
    sites = anatomy(build_encoder_decoder("t5")).sites
    chosen = {site.name for site in sites if "linear" in site.operation.parts and read_key("linear@mlp.in[-1]").matches(site)}
    assert chosen == {"encoder_blocks.1.mlp.in", "decoder_blocks.1.mlp.in"}
    attentions = {site.name for site in sites if site.kind == "scores" and read_key("scores@attn").matches(site)}
    assert attentions == {site.name for site in sites if site.kind == "scores"} and len(attentions) == 6
    both = {"scores@attn": Scale(0.1), "scores@cross_attn": Scale(0.2)}
    for site in (site for site in sites if site.kind == "scores"):
        assert rule_for(both, site) is both["scores@cross_attn" if "cross" in site.name else "scores@attn"]


# The recipes.


def test_gamma_as_the_authors_examples_have_it() -> None:
    """Gamma on the MLPs and the head, the gradient at q, k, v and o, a constant pattern: each layer by its dense formula."""
    model, image = build_classifier("vit"), inputs_for("vit")[0]
    with no_upcasts():
        cache = propagate(model, image, logit_diff(1, 2), rules="cp_lrp_gamma", names_filter=lambda _: True, audit=True)
    assert unexplained(cache) < 1e-9
    seen = set()
    for site in (site for site in anatomy(model).sites if isinstance(site.operation, Linear)):
        op, hook_in, hook_out = site.operation, str(site.inputs[0].name), site.output_name
        assert isinstance(op, Linear)
        x, y, g = (flat(t) for t in (cache.activations[hook_in], cache.activations[hook_out], cache.coefficients[hook_out]))
        gamma = 0.05 if site.mount in ("in", "out", "unembed") else 0.0
        if site.mount in ("q", "k"):
            assert float(g.abs().max()) == 0  # the pattern is a constant
            continue
        seen.add((site.mount, gamma))
        close(flat(cache[hook_in]), dense(op, x, y, g, gamma), 1e-9)
    assert seen == {("v", 0.0), ("o", 0.0), ("in", 0.05), ("out", 0.05), ("unembed", 0.05)}
    everywhere = propagate(model, image, logit_diff(1, 2), rules={**rulesets()["attnlrp"], "linear": GammaRule(0.05)})
    apart = torch.corrcoef(torch.stack([cache.patches().flatten(), everywhere.patches().flatten()]))[0, 1]
    assert float(apart) < 0.99


def test_plain_norms_of_queries_and_keys_by_name() -> None:
    model = build("qwen3")
    by_hand = {**rulesets()["attnlrp"], "norm@q_norm": Rule(), "norm@k_norm": Rule()}
    named, written, usual = (propagate(model, TOKENS, TARGET, rules=rules).tokens() for rules in ("attnlrp_plain_qk", by_hand, "attnlrp"))
    assert torch.equal(named, written) and not torch.allclose(named, usual)


def test_a_recipe_that_is_not_for_a_model_says_why() -> None:
    for family in ("gpt2", "llama"):
        with pytest.raises(RelevanceError, match="'norm@q_norm' is for no operation of this model: it has 'norm@ln1'"):
            propagate(build(family), TOKENS, TARGET, rules="attnlrp_plain_qk")
    with pytest.raises(RelevanceError, match="'linear@mlp.in' is for no operation of this model"):
        propagate(build("native_attn_only"), TOKENS, TARGET, rules="cp_lrp_gamma")


def test_coverage_says_where_a_ruleset_does_not_apply() -> None:
    here, there = (coverage(build(family)).rulesets.set_index("ruleset") for family in ("gpt2", "qwen3"))
    assert there["applies"].all() and there["works"].all() and there["unexplained"].max() < 1e-4
    assert here.index[~here["applies"]].tolist() == ["attnlrp_plain_qk"] and here["works"].equals(here["applies"])
    assert "'norm@q_norm' is for no operation" in here.loc["attnlrp_plain_qk", "reason"]
    assert set(here.drop("attnlrp_plain_qk")["reason"]) == {""}


def test_a_place_goes_before_a_bare_key_as_ever() -> None:
    table = {"norm": LNRule(), "norm@ln_final": Rule()}
    sites = {site.name: rule_for(table, site) for site in anatomy(deep()).sites if site.kind == "norm" and ":" not in site.name}
    assert sites.pop("ln_final") is table["norm@ln_final"] and set(sites.values()) == {table["norm"]}
