"""Where the target's value goes: conservation, the account of it, and that the account notices a wrong rule."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lens_relevance import log_prob, propagate, rulesets
from lens_relevance.errors import MismatchError, NotKeptError
from lens_relevance.rules import Identity, LNRule, Operation, PairNorm, PairProduct, PairSoftmax, Rescale, Rule
from lens_relevance.rules.base import Coefficients
from tests.engine.families import (
    FAMILIES,
    PAIRS,
    RULESETS,
    TARGET,
    UPCASTING,
    build,
    close,
    exact,
    inputs_and_reference,
    reference_for,
    unexplained,
    zero_all_that_keeps,
)
from tests.models import build_gpt2, random_tokens

TOKENS, OTHER = inputs_and_reference()


@pytest.mark.parametrize("family", FAMILIES)
def test_cp_lrp_conserves_without_biases_and_positions(family: str) -> None:
    with exact(family):
        model = build(family)
        zero_all_that_keeps(model)
        cache = propagate(model, TOKENS, TARGET, rules="cp_lrp", audit=True)
    close(cache.tokens().sum(1), cache.value, 1e-9)
    close(cache.residual().sum(1), cache.value.unsqueeze(1).expand(-1, 3), 1e-9)
    kept = cache.conservation().set_index("layer").drop(columns=["example", "value", "relevance"])
    assert float(kept.sum(axis=1).abs().max()) < 1e-9
    assert float(kept.drop(columns=["softmax", "product"]).abs().max().max()) < 1e-9


def test_what_does_not_conserve() -> None:
    """Without the biases, attnlrp keeps a part in the softmax and gradient x input in almost everything."""
    model = build_gpt2(dtype=torch.float64)
    zero_all_that_keeps(model)
    for rules in ("attnlrp", "gradient", "relp", "gim"):
        cache = propagate(model, TOKENS, TARGET, rules=rules)
        assert float(((cache.tokens().sum(1) - cache.value) / cache.value).abs().min()) > 1e-3, rules


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_explained(family: str) -> None:
    """Under every ruleset, alone and between two runs."""
    with exact(family):
        model = build(family)
        for rules in RULESETS:
            for reference in (OTHER,) if rules in PAIRS else (None, OTHER):
                cache = propagate(model, TOKENS, TARGET, rules=rules, reference=reference, audit=True)
                assert unexplained(cache) < 1e-9, (rules, reference is not None)


@pytest.mark.parametrize("family", UPCASTING)
def test_everything_is_explained_as_the_model_is(family: str) -> None:
    model = build(family)
    for rules in RULESETS:
        assert unexplained(propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER), audit=True)) < 1e-6, rules


@pytest.mark.parametrize("rules", RULESETS)
def test_targets_that_are_not_linear_have_a_sink(rules: str) -> None:
    model = build_gpt2(dtype=torch.float64)
    for target in (log_prob(3), lambda logits: logits[:, -1].square().sum(-1)):
        cache = propagate(model, TOKENS, target, rules=rules, reference=reference_for(rules, OTHER), audit=True)
        assert unexplained(cache) < 1e-9
        at_target = cache.conservation().set_index("layer").loc["output", "target"]
        assert (at_target.abs().max() > 1e-3) == (rules not in PAIRS)  # a pair's target is passed exactly: quadratics by quadrature


def test_the_account_reads_from_the_embeddings_to_the_output() -> None:
    cache = propagate(build_gpt2(dtype=torch.float64), TOKENS, TARGET, rules="attnlrp", audit=True)
    account = cache.conservation()
    assert account["layer"].tolist() == ["embed", "0", "1", "output"] * 2 and account["example"].tolist() == [0] * 4 + [1] * 4
    assert account["value"].tolist() == pytest.approx(cache.value.repeat_interleave(4).tolist())
    first = account[account["layer"] == "embed"]
    assert first["relevance"].tolist() == pytest.approx(cache.tokens().sum(1).tolist())
    assert first["positions"].tolist() == pytest.approx(cache.positions().sum(1).tolist())
    for i in (0, 1):
        assert account[account["layer"] == str(i)]["relevance"].tolist() == pytest.approx(cache.residual()[:, :, i].sum(1).tolist())
    columns = account.columns.drop(["example", "layer", "value", "relevance"])
    total = account.groupby("example")[list(columns)].sum().sum(axis=1) + first.set_index("example")["relevance"]
    assert total.tolist() == pytest.approx(cache.value.tolist())
    account["value"] = 0.0
    assert cache.conservation()["value"].abs().min() > 0  # a copy


def test_sinks_are_what_the_closed_forms_say() -> None:
    """The account of layer 0 against the formulas: bias . g at each output, R_A - R_s in the softmax, -R_z in a plain product."""
    model = build_gpt2(dtype=torch.float64)
    block = model.original_model.transformer.h[0]
    linear = {"attn.q": 0, "attn.k": 1, "attn.v": 2}
    for rules in ("attnlrp", "relp", "cp_lrp", "gradient"):
        cache = propagate(model, TOKENS, TARGET, rules=rules, audit=True, names_filter=lambda name: True)
        row = cache.conservation().query("layer == '0'")

        def at(point: str, coefficients: bool = False) -> Tensor:
            name = f"blocks.0.{point}"
            if name not in cache:  # noqa: B023 - used at once
                return torch.zeros(2, dtype=torch.float64)
            return cache.coefficients[name] if coefficients else cache[name].flatten(1).sum(1)  # noqa: B023

        biases = torch.zeros(2, dtype=torch.float64)
        joint = block.attn.c_attn.bias.detach().chunk(3)
        for point, i in linear.items():
            if f"blocks.0.{point}.hook_out" in cache:
                biases += (at(f"{point}.hook_out", True).flatten(2) * joint[i]).sum((1, 2))
        for point, bias in {"attn.o": block.attn.c_proj.bias, "mlp.in": block.mlp.c_fc.bias, "mlp.out": block.mlp.c_proj.bias}.items():
            biases += (at(f"{point}.hook_out", True) * bias.detach()).sum((1, 2))
        assert row["biases"].tolist() == pytest.approx(biases.tolist(), rel=1e-9), rules
        if rules != "gradient":
            betas = sum(
                (at(f"{ln}.hook_out", True) * getattr(block, hf).bias.detach()).sum((1, 2)) for ln, hf in (("ln1", "ln_1"), ("ln2", "ln_2"))
            )
            assert row["norm_biases"].tolist() == pytest.approx(betas.tolist(), rel=1e-9), rules  # type: ignore[union-attr]
            assert row["norm"].abs().max() == 0 and row["activation"].abs().max() == 0
        if rules == "cp_lrp":
            assert (row["softmax"] + row["product"]).abs().max() < 1e-12
            continue
        softmax = at("attn.hook_pattern") - at("attn.hook_attn_scores")
        assert row["softmax"].tolist() == pytest.approx(softmax.tolist(), rel=1e-8), rules
        if rules == "attnlrp":
            assert row["product"].abs().max() < 1e-12 and row["scores"].abs().max() < 1e-12
        else:
            assert row["product"].tolist() == pytest.approx((-at("attn.o.hook_in")).tolist(), rel=1e-8), rules
            assert row["scores"].tolist() == pytest.approx((-at("attn.hook_attn_scores")).tolist(), rel=1e-8), rules


def corrupted(rule: type[Rule]) -> Rule:
    """The rule with a tenth too much in its backward."""

    class Corrupted(rule):  # type: ignore[valid-type, misc]
        def backward(self, op: Operation, kept: Sequence[Tensor], upstream: Tensor) -> Coefficients:
            return tuple(None if c is None else 1.1 * c for c in super().backward(op, kept, upstream))

    return Corrupted()


@pytest.mark.parametrize(
    "rules, operation, rule",
    [
        ("attnlrp", "norm", LNRule),
        ("cp_lrp", "norm@ln_final", LNRule),
        ("relp", "activation", Identity),
        ("deeplift", "norm", PairNorm),
        ("deeplift", "activation", Rescale),
        ("deeplift", "scores", PairProduct),
        ("deeplift", "pattern", PairSoftmax),
        ("deeplift", "z", PairProduct),
    ],
)
def test_the_account_notices_a_wrong_rule(rules: str, operation: str, rule: type[Rule]) -> None:
    model = build_gpt2(dtype=torch.float64)
    right = rulesets()[rules]
    reference = reference_for(rules, OTHER)
    assert unexplained(propagate(model, TOKENS, TARGET, rules=right, reference=reference, audit=True)) < 1e-9
    wrong = {**right, operation: corrupted(rule)}
    if rules == "deeplift":  # noticed without the account too
        with pytest.raises(MismatchError, match="does not add up: between"):
            propagate(model, TOKENS, TARGET, rules=wrong, reference=reference)
    cache = propagate(model, TOKENS, TARGET, rules=wrong, reference=reference, audit=True, check=rules != "deeplift")
    assert unexplained(cache) > 1e-4
    if operation == "norm@ln_final":  # and says where
        account = cache.conservation().set_index("layer")["unexplained"].abs()
        assert account["output"].min() > 1e-3 and account.drop("output").max() < 1e-9


def test_without_audit_there_is_no_account() -> None:
    cache = propagate(build_gpt2(), TOKENS, TARGET)
    with pytest.raises(NotKeptError, match="audit=True"):
        cache.conservation()


@pytest.mark.parametrize("rules", RULESETS)
def test_the_account_of_several_references_and_of_padding(rules: str) -> None:
    from lens_relevance import random_tokens as random_references

    model, tokens = build_gpt2(), random_tokens(pos=7)
    if rules in PAIRS:
        cache = propagate(model, tokens, TARGET, rules=rules, reference=random_references(3), audit=True)
        assert unexplained(cache) < 1e-5
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    other = random_tokens(pos=7, seed=3) if rules in PAIRS else None
    cache = propagate(model, tokens, TARGET, rules=rules, reference=other, attention_mask=mask, audit=True)
    assert unexplained(cache) < 1e-5
