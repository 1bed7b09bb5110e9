"""Circuits: evaluation equal to TransformerLens's and to the definitions, and known circuits found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import Node, faithfulness

from analyses.circuits import (
    Ablation,
    ItemScores,
    above,
    auroc,
    faithfulness_curve,
    faithfulness_table,
    frequent,
    greedy,
    known_circuit,
    overlap,
    score_items,
    top,
)
from analyses.circuits.faithfulness import areas, sizes
from analyses.circuits.faithfulness import faithfulness as recovered
from analyses.circuits.recovery import area_under_roc
from analyses.evaluation.stability import RESAMPLES, resampling_weights
from analyses.methods import eap_ig
from analyses.tasks import pronoun
from analyses.tasks.pairs import PromptPairs
from lens_relevance import CoverageError, RelevanceError, logit_diff
from tests import models
from tests.analyses.known_circuits import KNOWN
from tests.precision import no_upcasts
from tests.wider_models import build_wider

BUILDERS: dict[str, Any] = {
    "gpt2": models.build_gpt2,
    "neox": models.build_neox,
    "llama": models.build_llama,
    "qwen3": models.build_qwen3,
    "gemma2": models.build_gemma2,
    "olmo2": models.build_olmo2,
    "native_gqa": lambda **k: models.build_native(n_key_value_heads=2, **k),
}


def some_pairs(n: int = 3) -> PromptPairs:
    return PromptPairs(models.random_tokens(n), models.random_tokens(n, seed=1), logit_diff(3, 4))


@pytest.fixture
def ablation() -> Ablation:
    return Ablation(models.build_gpt2(), some_pairs(), "edge")


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("level", ["node", "edge"])
def test_full_is_the_clean_run_and_empty_the_corrupt_one(family: str, level: Any) -> None:
    model, pairs = BUILDERS[family](dtype=torch.float64), some_pairs()
    with no_upcasts():
        ablation = Ablation(model, pairs, level)
        metric = pairs.target.metric(model, pairs.clean)
        clean, corrupt = metric(model(pairs.clean)), metric(model(pairs.corrupt))
    assert torch.allclose(ablation.full, clean, atol=1e-12) and torch.allclose(ablation.empty, corrupt, atol=1e-12)
    assert (clean - corrupt).abs().min() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "neox", "llama", "qwen3", "native_gqa"])
def test_a_node_is_all_its_edges(family: str) -> None:
    """Without post-norms, removing a node is removing every edge that leaves it: two ways of computing the same thing."""
    model = BUILDERS[family](dtype=torch.float64)
    with no_upcasts():
        edges, nodes = Ablation(model, some_pairs(), "edge"), Ablation(model, some_pairs(), "node")
        kept = torch.rand(6, len(nodes.items), generator=torch.Generator().manual_seed(0)) > 0.4
        by_edges, by_nodes = edges(kept[:, torch.from_numpy(edges.items.index[:, 1])]), nodes(kept)
    assert torch.allclose(by_edges, by_nodes, atol=1e-10) and by_nodes.std(0).min() > 1e-3


def theirs(model: TransformerBridge, pairs: PromptPairs, ablation: Ablation, kept: np.ndarray) -> float:
    """What TransformerLens's `faithfulness` recovers with these edges, given by position."""

    def node(name: str, position: int) -> Node:
        if name == "embed":
            return Node("embed", position)
        if name == "logits":
            return Node("logits", position, layer=model.cfg.n_layers - 1)
        layer = int(name[1])
        if "mlp" in name:
            return Node("mlp_in" if name.endswith("in") else "mlp_out", position, layer=layer)
        kind: Any = f"{name[-1]}_input" if "." in name else "attn_head_out"
        return Node(kind, position, layer=layer, head=int(name.split(".")[0].split("H")[1]))

    frame = ablation.items.frame[kept]
    circuit = [(node(r.source, r.position), node(r.target, r.position)) for r in frame.itertuples()]
    return faithfulness(model, pairs.clean, pairs.corrupt, lambda x: x[0, -1, 3] - x[0, -1, 4], circuit).recovered


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_equals_transformer_lens(family: str) -> None:
    model, pairs = BUILDERS[family](dtype=torch.float64), some_pairs(1)
    ablation = Ablation(model, pairs, "edge", by_position=True)
    generator = np.random.default_rng(0)
    for share in (0.2, 0.6, 0.95):
        kept = generator.random(len(ablation.items)) < share
        metric = ablation(torch.from_numpy(kept[None]))[0]
        mine = float((metric - ablation.empty) / (ablation.full - ablation.empty))
        assert mine == pytest.approx(theirs(model, pairs, ablation, kept), abs=1e-9)


def test_rows_do_not_depend_on_how_many_run_at_once(ablation: Ablation) -> None:
    kept = torch.rand(7, len(ablation.items), generator=torch.Generator().manual_seed(1)) > 0.5
    together = ablation(kept)
    ablation.bytes_at_once = 1
    assert torch.allclose(ablation(kept), together, atol=1e-5)


def test_padded_pairs_equal_unpadded_ones() -> None:
    model, pairs = models.build_gpt2(), some_pairs(1)
    longer = PromptPairs(
        torch.cat([pairs.clean, pairs.clean[:, :2]], 1), torch.cat([pairs.corrupt, pairs.corrupt[:, :2]], 1), pairs.target,
        clean_mask=torch.tensor([[1] * 6 + [0] * 2]), corrupt_mask=torch.tensor([[1] * 6 + [0] * 2]),
    )  # fmt: skip
    kept = torch.rand(3, len(Ablation(model, pairs).items), generator=torch.Generator().manual_seed(1)) > 0.5
    assert torch.allclose(Ablation(model, longer)(kept), Ablation(model, pairs)(kept), atol=1e-5)


def test_mean_replacement() -> None:
    model, pairs, many = models.build_gpt2(), some_pairs(), models.random_tokens(5, seed=7)
    assert torch.allclose(
        Ablation(model, pairs, replacement="mean", mean_tokens=pairs.corrupt[:1]).empty,
        Ablation(model, replace(pairs, corrupt=pairs.corrupt[:1].expand(3, -1))).empty,
        atol=1e-5,
    ), "the mean over one prompt is that prompt"
    averaged = Ablation(model, pairs, "node", replacement="mean", mean_tokens=many)
    assert averaged.empty.std() < 1e-6 < averaged.full.std()


def test_areas_are_those_of_the_definition() -> None:
    """A perfect ranking of 5 among 25 nodes, whose circuit works only when complete, at MIB's sizes (methods: 0.149)."""
    share = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1])
    cpr, cmd = areas(share, (np.floor(share * 25) >= 5).astype(float))
    assert cmd == pytest.approx(0.149) and cpr == pytest.approx(0.999 - 0.149)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("level", ["node", "edge"])
def test_known_circuits_are_found_by_deeplift(name: str, level: Any) -> None:
    known = KNOWN[name]()
    ablation = Ablation(known.model, known.pairs, level)
    truth = known_circuit(ablation.items, known.nodes if level == "node" else known.edges)
    assert recovered(ablation, [truth])[0] == pytest.approx(1, abs=1e-5), "the circuit does the whole task"
    rest = ~torch.from_numpy(truth.kept)[None]
    assert torch.allclose(ablation(rest)[0], ablation.empty, atol=1e-5), "decoys do nothing"
    for item in np.flatnonzero(truth.kept):
        without = torch.from_numpy(truth.kept.copy())[None]
        without[0, item] = False
        assert (ablation(without)[0] - ablation.full).abs().max() > 0.1, "every part is needed"
    scores = score_items(ablation, "deeplift")
    assert auroc(scores, truth) == 1.0
    assert overlap(top(scores, len(truth)), truth).f1 == 1.0
    assert auroc(score_items(ablation, "gradient"), truth) < 1.0, "the gradient is 0 where the corrupt run saturates"


def test_gradient_fails_on_both_runs_where_a_relu_is_saturated_in_both() -> None:
    known = KNOWN["saturated_relu"]()
    ablation = Ablation(known.model, known.pairs, "node")
    truth = known_circuit(ablation.items, known.nodes)
    assert auroc(score_items(ablation, "gradient", run="mean"), truth) < 1.0
    assert auroc(score_items(ablation, "deeplift", run="clean"), truth) == 1.0
    assert auroc(score_items(ablation, "patching"), truth) == 1.0


def test_scores_of_edges_add_up_to_those_of_nodes() -> None:
    model, pairs = models.build_gpt2(dtype=torch.float64), some_pairs()
    for method in ("deeplift", "gradient", eap_ig(3)):
        nodes = score_items(Ablation(model, pairs, "node"), method)
        edges = score_items(Ablation(model, pairs, "edge"), method)
        total = edges.items.frame.assign(score=edges.signed).groupby("source")["score"].sum()
        assert np.allclose(total[nodes.items.frame["node"]], nodes.signed, atol=1e-10), method


def test_eap_ig_completes() -> None:
    """Integrated gradients of the embedding add up to the difference of the metric as steps grow."""
    model, pairs = models.build_gpt2(dtype=torch.float64), some_pairs()
    ablation = Ablation(model, pairs, "node")
    embed = [score_items(ablation, eap_ig(n)).signed[0] for n in (2, 24)]
    gap = float((ablation.full - ablation.empty).mean())
    assert abs(embed[1] - gap) < 0.02 * abs(gap) and abs(embed[1] - gap) < abs(embed[0] - gap)


def test_deeplift_of_the_embedding_is_the_difference_of_the_metric() -> None:
    ablation = Ablation(models.build_gpt2(dtype=torch.float64), some_pairs(), "node")
    assert score_items(ablation).signed[0] == pytest.approx(float((ablation.full - ablation.empty).mean()), abs=1e-10)


def test_curve_uses_every_k_on_small_graphs(ablation: Ablation) -> None:
    scores = score_items(ablation)
    curve = faithfulness_curve(ablation, scores, "signed")
    assert curve.frame["k"].tolist() == list(range(len(ablation.items) + 1))
    assert curve.frame["faithfulness"].iloc[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-4)
    assert curve.cmd == pytest.approx(np.trapezoid((1 - curve.frame["faithfulness"]).abs(), curve.frame["share"]))
    single = recovered(ablation, [top(scores, 20, "signed")])[0]
    assert curve.frame["faithfulness"][20] == pytest.approx(single, abs=1e-5)


def test_signed_order_goes_towards_the_full_model_whichever_way_that_is() -> None:
    model, pairs = models.build_gpt2(), some_pairs()
    up, down = (Ablation(model, replace(pairs, target=logit_diff(*tokens)), "node") for tokens in ((3, 4), (4, 3)))
    one, other = (faithfulness_curve(ablation, score_items(ablation), "signed") for ablation in (up, down))
    assert np.allclose(one.frame["faithfulness"], other.frame["faithfulness"], atol=1e-4) and one.cmd < 0.9


def test_choices(ablation: Ablation) -> None:
    scores = score_items(ablation)
    best = top(scores, 10)
    assert len(best) == 10 and set(map(tuple, best.to_frame().to_numpy())) == set(
        map(tuple, scores.to_frame().head(10)[["source", "target"]].to_numpy())
    )
    assert len(above(scores, float(np.abs(scores.signed).max()))) == 1
    grown = greedy(scores, 12).to_frame()
    reached = {"logits"} | set(grown["source"])
    assert len(grown) == 12 and {t.split(".")[0] if "H" in t else t.removesuffix(".in") for t in grown["target"]} <= reached


def test_frequent_items_are_those_of_most_resamples() -> None:
    """Counted by a loop over the resamples; and an estimate of single examples is what the mean is taken of."""
    ablation = Ablation(models.build_gpt2(), some_pairs(9), "edge")
    scores, n = score_items(ablation, "relp"), 12
    assert scores.by_pair is not None and scores.by_pair.shape == (9, len(scores.items))
    np.testing.assert_allclose(scores.by_pair.mean(0), scores.signed, rtol=1e-9)
    counts = np.zeros(len(scores.items))
    for drawn in resampling_weights(9).resamples:
        strongest = np.argsort(-np.abs((drawn[:, None] * scores.by_pair).sum(0)), kind="stable")[:n]
        counts[strongest] += 1
    for frequency in (0.9, 0.5):
        circuit = frequent(scores, n, frequency)
        assert circuit.kept.tolist() == (counts / RESAMPLES >= frequency).tolist()
    assert 0 < len(frequent(scores, n)) < n < len(frequent(scores, n, 0.01))
    known = ItemScores(scores.items, "read", scores.signed, scores.strength)
    for wrong, message in (
        (lambda: frequent(known, 3), "known as means alone"),
        (lambda: frequent(scores, 0), "a circuit has 1 to"),
        (lambda: frequent(scores, 3, 1.5), "a share of the resamples"),
    ):
        with pytest.raises(RelevanceError, match=message):
            wrong()


def test_auroc_counts_ties_half() -> None:
    positive = np.array([True, True, False, False])
    assert area_under_roc(np.array([2.0, 0, 0, 0]), positive) == pytest.approx(0.75)
    assert area_under_roc(np.array([0.0, 0, 0, 0]), positive) == pytest.approx(0.5)
    # of 3 and 1 against 2, 1, 0: 3 wins three times, 1 wins once and draws once
    rows, two = np.array([[3.0, 1.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]]), np.array([True, True, False, False, False])
    assert area_under_roc(rows, two).tolist() == [4.5 / 6, 0.5]


def test_patching_scores_are_single_node_interventions() -> None:
    """Denoising and noising by hand: one node's output exchanged between the runs, everything below it computed anew."""
    model, pairs = models.build_gpt2(dtype=torch.float64), some_pairs(2)
    scores = score_items(Ablation(model, pairs, "node"), "patching")
    place = scores.items.frame["node"].tolist()
    metric = pairs.target.metric(model, pairs.clean)
    for name, hook, index in (("L0H2", "blocks.0.attn.o.hook_in", 2), ("L1.mlp", "blocks.1.mlp.hook_out", slice(None))):

        def into(run: torch.Tensor, other: torch.Tensor, hook: str = hook, index: Any = index) -> torch.Tensor:
            value = model.run_with_cache(other)[1][hook]

            def exchange(x: torch.Tensor, hook: Any) -> torch.Tensor:
                x = x.clone()
                x[:, :, index] = value[:, :, index]
                return x

            return metric(model.run_with_hooks(run, fwd_hooks=[(hook, exchange)]))

        denoising = into(pairs.corrupt, pairs.clean) - metric(model(pairs.corrupt))
        noising = metric(model(pairs.clean)) - into(pairs.clean, pairs.corrupt)
        assert scores.signed[place.index(name)] == pytest.approx(float((denoising + noising).detach().mean() / 2), abs=1e-10)
        assert (denoising - noising).abs().max() > 1e-3


def test_held_out_pairs_are_evaluated_on_and_not_scored_on() -> None:
    model, pairs = models.build_gpt2(), some_pairs(4)
    table = faithfulness_table(model, pairs[:2], ("deeplift",), level="node", held_out=pairs[2:])
    found_on, held_out = (Ablation(model, pairs[rows], "node") for rows in (slice(0, 2), slice(2, 4)))
    for row in table.itertuples():
        scores = score_items(found_on, "deeplift")
        assert row.cmd == pytest.approx(faithfulness_curve(held_out, scores, row.order).cmd)
        assert row.selection_cmd == pytest.approx(faithfulness_curve(found_on, scores, row.order).cmd) != row.cmd
    assert table["selection_cmd"].is_monotonic_increasing


def test_scores_and_strengths_are_means_over_pairs() -> None:
    model, pairs = models.build_gpt2(dtype=torch.float64), some_pairs(3)
    for level in ("node", "edge"):
        whole = score_items(Ablation(model, pairs, level), "relp")
        each = np.stack([score_items(Ablation(model, pairs[i], level), "relp").signed for i in range(3)])
        np.testing.assert_allclose(whole.signed, each.mean(0), rtol=1e-6, atol=1e-12)
        np.testing.assert_allclose(whole.strength, np.abs(each).mean(0), rtol=1e-6, atol=1e-12)
        assert (whole.strength > 1.1 * np.abs(whole.signed)).any()


def test_precision_is_of_the_circuit_and_recall_of_the_known_one(ablation: Ablation) -> None:
    edges = [("embed", "L0H0.q"), ("embed", "logits"), ("L0H1", "logits"), ("L1.mlp", "logits")]
    found = overlap(known_circuit(ablation.items, edges[:3]), known_circuit(ablation.items, edges[2:]))
    assert (found.precision, found.recall) == (1 / 3, 1 / 2) and found.f1 == pytest.approx(0.4)


def test_rows_are_ordered_by_the_pairs_that_circuits_are_chosen_on() -> None:
    pairs = some_pairs(4)
    methods = ("deeplift", "gradient", "attnlrp", "gim", "random")
    table = faithfulness_table(models.build_gpt2(), pairs[:2], methods, level="node", held_out=pairs[2:])
    assert table["selection_cmd"].is_monotonic_increasing and not table["cmd"].is_monotonic_increasing
    alone = faithfulness_table(models.build_gpt2(), pairs[:2], methods, level="node")
    assert alone["cmd"].is_monotonic_increasing


def test_sizes_of_large_circuits_are_those_of_mib() -> None:
    assert sizes(5000).tolist() == [5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000]
    assert sizes(999).tolist() == list(range(1000))


def test_random_is_the_mean_over_five_orders() -> None:
    model, pairs = models.build_gpt2(), some_pairs(2)
    table = faithfulness_table(model, pairs, ("random",), level="node", seed=3).set_index("order")
    ablation = Ablation(model, pairs, "node")
    for order in ("absolute", "signed"):
        curves = [faithfulness_curve(ablation, score_items(ablation, "random", seed=seed), order) for seed in range(3, 8)]
        assert len({curve.cmd for curve in curves}) == 5
        assert table.loc[order, ["cmd", "cpr"]].tolist() == pytest.approx(np.mean([(c.cmd, c.cpr) for c in curves], axis=0), rel=1e-9)


@pytest.mark.parametrize("family", ["bloom", "opt", "gptj", "bert", "mixtral"])
def test_more_families(family: str) -> None:
    """Both ends of the range are the model's own runs, and removing a node does something of its own."""
    model, pairs = build_wider(family), some_pairs(2)
    with no_upcasts():
        nodes = Ablation(model, pairs, "node")
        one = ~torch.eye(len(nodes.items), dtype=torch.bool)
        assert len({round(float(x), 9) for x in nodes(one)[:, 0]}) == len(nodes.items)
        if family == "bert":
            with pytest.raises(CoverageError, match="normalizes the residual stream"):
                Ablation(model, pairs, "edge")
            return
        edges = Ablation(model, pairs, "edge")
        assert torch.allclose(edges(one[:, torch.from_numpy(edges.items.index[:, 1])]), nodes(one), atol=1e-9)


def test_a_circuit_whose_ends_are_not_the_models_is_refused() -> None:
    model, pairs = models.build_gpt2(), some_pairs(2)
    with model.hooks(fwd_hooks=[("blocks.1.hook_in", lambda x, hook: x * 2)]), pytest.raises(RelevanceError, match="rebuilt"):
        Ablation(model, pairs, "edge")


def test_table_of_methods_on_a_trained_model(stories: TransformerBridge) -> None:
    table = faithfulness_table(stories, pronoun(stories, 4, 0), ("deeplift", "random"), level="node")
    assert list(table.columns) == ["method", "order", "cmd", "cpr"] and len(table) == 4
    best = table.groupby("method")["cmd"].min()
    assert best["deeplift"] < 0.7 * best["random"]


def test_errors_name_the_thing(ablation: Ablation) -> None:
    model, pairs, scores = ablation.model, ablation.pairs, score_items(ablation)
    with pytest.raises(RelevanceError, match="NaN"):
        ItemScores(scores.items, "mine", scores.signed * np.nan, scores.strength)
    with pytest.raises(RelevanceError, match="empty circuit"):
        above(scores, 1e9)
    with pytest.raises(RelevanceError, match="n=0"):
        top(scores, 0)
    with pytest.raises(RelevanceError, match="is empty"):
        known_circuit(scores.items, [])
    with pytest.raises(RelevanceError, match="is no edge"):
        known_circuit(scores.items, [("embed", "L9H0.q")])
    with pytest.raises(RelevanceError, match="undefined"):
        same = Ablation(model, replace(pairs, corrupt=pairs.clean))
        faithfulness_curve(same, scores)
    with pytest.raises(RelevanceError, match="mean_tokens"):
        Ablation(model, pairs, replacement="mean")
    with pytest.raises(RelevanceError, match="per edge"):
        score_items(ablation, "patching")
    with pytest.raises(RelevanceError, match="logits"):
        greedy(score_items(Ablation(model, pairs, "node")), 3)
    with pytest.raises(RelevanceError, match="shape"):
        ablation(torch.ones(2, 3, dtype=torch.bool))
    assert all(not point._forward_hooks for point in model.hook_dict.values())
