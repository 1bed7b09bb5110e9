"""One registry of attribution methods, and one EAP-IG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import Ablation, faithfulness_table, score_items
from analyses.components import parse_node
from analyses.evaluation.comparison import compare_with_patching
from analyses.evaluation.ranking import rank_heads
from analyses.methods import Estimator, Scores, by_ruleset, conductance, eap_ig, estimator, method_names, register_method, registry
from analyses.perturbation import attribution, perturbation_curves
from analyses.tasks import PromptPairs
from lens_relevance import RelevanceError, logit_diff, propagate
from tests import models
from tests.analyses.test_ranking import random_pairs
from tests.precision import no_upcasts


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_every_name_is_found_in_the_table_as_it_was_given(gpt2: TransformerBridge) -> None:
    names = ["eap_ig", "conductance", "relp", "chefer", "chefer_2021b"]
    assert set(names) <= set(method_names()) and [estimator(name).name for name in method_names()] == method_names()
    table = compare_with_patching(gpt2, random_pairs(2), [*names, eap_ig(3)], components=["heads"], resamples=0)
    assert sorted(table["method"]) == sorted([*names, "eap_ig (3 steps)"])


def test_the_clean_run_is_the_corrupt_run_of_the_pair_turned_round() -> None:
    masks = torch.ones(2, 5, 6, dtype=torch.long)
    masks[0, 0, -1] = 0
    given = random_pairs()
    pairs = PromptPairs(given.clean, given.corrupt, given.target, *masks)
    relp, symmetric = estimator("relp"), estimator("deeplift")
    assert [weight for weight, _ in relp.parts(pairs, "mean")] == [0.5, -0.5]
    ((weight, turned),) = relp.parts(pairs, "clean")
    assert weight == -1.0
    for one, other in (("clean", "corrupt"), ("corrupt", "clean"), ("clean_mask", "corrupt_mask"), ("corrupt_mask", "clean_mask")):
        assert torch.equal(getattr(turned, one), getattr(pairs, other))
    assert symmetric.parts(pairs, "mean") == [(1.0, pairs)] == relp.parts(pairs, "corrupt")
    assert (relp.passes("mean"), relp.passes("clean"), symmetric.passes("mean")) == (2, 1, 1)


def test_two_methods_of_one_name_are_refused(gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="two methods are called 'eap_ig'"):
        compare_with_patching(gpt2, random_pairs(2), ["eap_ig", replace(eap_ig(2), name="eap_ig")], components=["heads"])


def test_one_step_of_eap_ig_is_the_gradient_half_way(gpt2: TransformerBridge) -> None:
    """By plain autograd: the embeddings are the mean of the two runs', and g is the gradient there."""
    pairs = random_pairs()
    embeddings = [gpt2.run_with_cache(tokens)[1]["embed.hook_out"] for tokens in (pairs.clean, pairs.corrupt)]
    values = [gpt2.run_with_cache(tokens)[1]["blocks.0.hook_mlp_out"] for tokens in (pairs.clean, pairs.corrupt)]
    seen: list[torch.Tensor] = []

    def keep(x: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(x.clone())
        seen[0].retain_grad()
        return seen[0]

    middle = (embeddings[0] + embeddings[1]) / 2
    logits = gpt2.run_with_hooks(pairs.corrupt, fwd_hooks=[("embed.hook_out", lambda x, hook: middle), ("blocks.0.hook_mlp_out", keep)])
    pairs.metric(gpt2)(logits).sum().backward()
    gpt2.zero_grad()
    assert seen[0].grad is not None
    expected = ((values[0] - values[1]) * seen[0].grad).sum(2).detach()
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(eap_ig(1)(gpt2, pairs, ["mlp"])["mlp"][:, 0], expected, rtol=1e-4, atol=1e-5)


def test_the_error_of_eap_ig_falls_with_the_square_of_its_steps() -> None:
    model, pairs = models.build_gpt2(torch.float64), random_pairs()
    metric = pairs.metric(model)
    with torch.no_grad():
        gap = metric(model(pairs.clean)) - metric(model(pairs.corrupt))
    errors = [float((eap_ig(steps)(model, pairs, ["resid"])["resid"][:, 0].sum(1) - gap).abs().max()) for steps in (8, 32)]
    assert 0 < errors[1] < errors[0] / 12  # 16 as steps grow; end points would give 4


@pytest.mark.parametrize("build", [models.build_gpt2, models.build_llama, models.build_neox])
def test_eap_ig_of_components_nodes_and_edges_is_one(build: Any) -> None:
    model, pairs = build(dtype=torch.float64), random_pairs(3)
    with no_upcasts():
        scores = eap_ig(3)(model, pairs, ["heads", "mlp", "resid"])
        nodes = score_items(Ablation(model, pairs, "node"), eap_ig(3))
        edges = score_items(Ablation(model, pairs, "edge"), eap_ig(3))
    sums = edges.items.frame.assign(score=edges.signed).groupby("source")["score"].sum()
    for name, found in zip(nodes.items.frame["node"], nodes.signed, strict=True):
        node = parse_node(name)
        if node.component == "embed":
            expected = scores["resid"][:, 0].sum(1)
        else:
            expected = scores[node.component][:, node.layer].sum(1) if node.head is None else scores["heads"][:, node.layer, node.head]
        assert found == pytest.approx(float(expected.mean()), abs=1e-12)
        assert found == pytest.approx(sums[name], abs=1e-12)
    assert np.abs(nodes.signed).min() > 1e-4


@pytest.mark.parametrize("method", ["atp_star", "direct_logit_attribution"])
def test_methods_without_edges_order_nodes(gpt2: TransformerBridge, method: str) -> None:
    pairs = random_pairs(3)
    ablation = Ablation(gpt2, pairs, "node")
    scores, nodes = estimator(method)(gpt2, pairs, ["heads", "mlp", "resid"]), score_items(ablation, method)
    by_name = dict(zip(nodes.items.frame["node"], nodes.signed, strict=True))
    assert nodes.method == method
    assert by_name["L1H2"] == pytest.approx(float(scores["heads"][:, 1, 2].mean()), rel=1e-5) != 0
    assert by_name["L0.mlp"] == pytest.approx(float(scores["mlp"][:, 0].sum(1).mean()), rel=1e-5) != 0
    assert by_name["embed"] == pytest.approx(float(scores["resid"][:, 0].sum(1).mean()), rel=1e-5)
    # the last position, which alone is written straight to the logits, has the same token in both prompts
    assert (by_name["embed"] == 0) == (method == "direct_logit_attribution")
    with pytest.raises(RelevanceError, match=f"{method} cannot order these items, which are edges"):
        score_items(Ablation(gpt2, pairs, "edge"), method)
    with pytest.raises(RelevanceError, match="by position"):
        score_items(Ablation(gpt2, pairs, "node", by_position=True), method)


def test_methods_that_score_heads_alone_order_no_circuit(gpt2: TransformerBridge) -> None:
    with pytest.raises(RelevanceError, match="rollout cannot order these items.* it scores heads"):
        score_items(Ablation(gpt2, random_pairs(2), "node"), "rollout")
    with pytest.raises(RelevanceError, match="unknown method 'nonsense'"):
        score_items(Ablation(gpt2, random_pairs(2), "node"), "nonsense")


def test_faithfulness_of_estimators(gpt2: TransformerBridge) -> None:
    table = faithfulness_table(gpt2, random_pairs(3), [eap_ig(5), conductance(2), "random"], level="node")
    assert sorted(set(table["method"])) == ["conductance (2 steps)", "eap_ig (5 steps)", "random"]
    assert np.isfinite(table[["cmd", "cpr"]].to_numpy()).all()


def test_methods_that_need_a_pair_score_no_single_prompts(gpt2: TransformerBridge) -> None:
    tokens, mask = models.random_tokens(2), torch.ones(2, 6, dtype=torch.long)
    for method in ("eap_ig", "atp_star", "conductance", "direct_logit_attribution"):
        with pytest.raises(RelevanceError, match=f"{method} compares the two runs of a pair"):
            attribution(method)
    found = attribution(by_ruleset({}, "mine"))(gpt2, tokens, logit_diff(3, 4), mask)
    assert torch.equal(found, propagate(gpt2, tokens, logit_diff(3, 4), rules="gradient").tokens()) and found.abs().max() > 1e-3


def attention_weighted(model: Any, pairs: PromptPairs, components: Sequence[str]) -> Scores:
    """A method of a user's own: how far each head's output moves between the runs."""
    runs = [model.run_with_cache(tokens)[1] for tokens in (pairs.clean, pairs.corrupt)]
    moved = [(runs[0][f"blocks.{i}.attn.hook_z"] - runs[1][f"blocks.{i}.attn.hook_z"]).norm(dim=(1, 3)) for i in range(len(model.blocks))]
    return {"heads": torch.stack(moved, 1).detach()}


def tokens_by_number(model: Any, inputs: Any, target: Any, **_: Any) -> torch.Tensor:
    return inputs.double()


def test_a_method_of_ones_own_is_added_by_one_call(gpt2: TransformerBridge, own_registry: None) -> None:
    mine = Estimator("x", attention_weighted, forwards=2, backwards=0, components=("heads",), single_run=True, tokens=tokens_by_number)
    register_method("moved", mine)
    register_method("relp_by_hand", lambda: by_ruleset("relp"))
    pairs = random_pairs(3)
    assert {"moved", "relp_by_hand"} <= set(method_names())
    best = rank_heads(gpt2, pairs, "moved").iloc[0]
    expected = attention_weighted(gpt2, pairs, ["heads"])["heads"].mean(0)
    assert best["score"] == pytest.approx(float(expected.max()), rel=1e-5)
    table = compare_with_patching(gpt2, pairs, ["moved", "relp", "relp_by_hand"], components=["heads"], resamples=0).set_index("method")
    assert {"moved", "relp", "relp_by_hand"} == set(table.index) and table.loc["moved", "forwards"] == 2
    assert table.loc["relp", "pearson"] == pytest.approx(table.loc["relp_by_hand", "pearson"])
    circuits = faithfulness_table(gpt2, pairs, ["relp", "relp_by_hand"], level="edge").groupby("method")["cmd"].min()
    assert circuits["relp"] == pytest.approx(circuits["relp_by_hand"])
    curves = perturbation_curves(gpt2, pairs.clean, logit_diff(3, 4), methods=["moved"])
    assert set(curves["method"]) == {"random", "moved"}
    for taken in ("moved", "deeplift", "eap_ig", "random"):
        with pytest.raises(RelevanceError, match="exists already"):
            register_method(taken, mine)
