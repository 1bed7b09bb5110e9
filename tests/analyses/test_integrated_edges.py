"""Edges integrated along the line between two runs (EAP-IG, conductance), against loops over the line, the writers and the readers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from analyses.circuits import Ablation, score_items, top
from analyses.methods import conductance, eap_ig, estimator
from analyses.tasks import PromptPairs
from tests import models
from tests.analyses.test_ranking import random_pairs
from tests.precision import no_upcasts

N_LAYERS, STEPS = 2, 3


def at(model: TransformerBridge, pairs: PromptPairs, share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What each writer of a GPT-2 contributes, [batch, pos, d_model], and the gradient at each reader's own input, in the run whose
    embeddings lie at a share of the way from the corrupt to the clean ones."""
    embeddings = [model.run_with_cache(tokens)[1]["embed.hook_out"] for tokens in (pairs.corrupt, pairs.clean)]
    here = torch.lerp(*embeddings, share)
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> Tensor:
        seen[hook.name] = x.clone()  # the clone is what the model goes on with
        seen[hook.name].retain_grad()
        return seen[hook.name]

    names = [
        f"blocks.{i}.{p}" for i in range(N_LAYERS) for p in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "ln2.hook_in")
    ]
    names += [f"blocks.{i}.{p}" for i in range(N_LAYERS) for p in ("ln1.hook_in", "hook_mlp_out")] + ["ln_final.hook_in"]
    logits = model.run_with_hooks(
        pairs.corrupt, fwd_hooks=[("embed.hook_out", lambda x, hook: here.clone().requires_grad_()), *((name, keep) for name in names)]
    )
    pairs.metric(model)(logits).sum().backward()
    written, wanted = {"embed": here}, {"logits": grad(seen, "ln_final.hook_in")}
    for i in range(N_LAYERS):
        block = model.blocks[i]
        z = seen[model_name(model, f"blocks.{i}.attn.hook_z")]
        n_heads, d_head = z.shape[2:]
        weight = block.attn.o.original_component.weight.detach()  # Conv1D: [in, out]
        for head in range(n_heads):
            written[f"L{i}H{head}"] = z[:, :, head] @ weight[head * d_head : (head + 1) * d_head]
        written[f"L{i}.mlp"] = seen[model_name(model, f"blocks.{i}.hook_mlp_out")]  # its bias is the same all along
        stream = seen[model_name(model, f"blocks.{i}.ln1.hook_in")].detach().requires_grad_()
        joint = block.ln1.original_component(stream) @ block.attn.qkv.original_component.weight.detach()
        for read, part in zip("qkv", joint.chunk(3, -1), strict=True):
            split, g = part.unflatten(-1, (n_heads, d_head)), grad(seen, model_name(model, f"blocks.{i}.attn.hook_{read}"))
            for head in range(n_heads):
                (wanted[f"L{i}H{head}.{read}"],) = torch.autograd.grad((split[:, :, head] * g[:, :, head]).sum(), stream, retain_graph=True)
        wanted[f"L{i}.mlp.in"] = grad(seen, model_name(model, f"blocks.{i}.ln2.hook_in"))
    model.zero_grad()
    return {name: x.detach() for name, x in written.items()}, wanted


def model_name(model: TransformerBridge, alias: str) -> str:
    """The name that the HookPoint itself bears."""
    return str(model.hook_dict[alias].name)


def grad(seen: dict[str, Tensor], name: str) -> Tensor:
    """The gradient that a kept tensor got."""
    gradient = seen[name].grad
    assert gradient is not None
    return gradient


def eap_ig_by_loop(model: TransformerBridge, pairs: PromptPairs) -> dict[tuple[str, str], Tensor]:
    """(u_clean - u_corrupt) . mean of g_v at the middles of equal parts."""
    clean, corrupt = at(model, pairs, 1.0)[0], at(model, pairs, 0.0)[0]
    middles = [at(model, pairs, (k + 0.5) / STEPS)[1] for k in range(STEPS)]
    return {
        (u, v): sum(((clean[u] - corrupt[u]) * g[v]).sum((1, 2)) for g in middles) / STEPS  # type: ignore[misc]
        for u in clean
        for v in middles[0]
    }


def conductance_by_loop(model: TransformerBridge, pairs: PromptPairs) -> dict[tuple[str, str], Tensor]:
    """Sum over the parts of the line of the change of u there, times the mean of g_v at both ends."""
    ends = [at(model, pairs, k / STEPS) for k in range(STEPS + 1)]
    total: dict[tuple[str, str], Tensor] = {}
    for (u, g), (later, h) in zip(ends, ends[1:], strict=False):
        for writer in u:
            for reader in g:
                step = ((later[writer] - u[writer]) * (g[reader] + h[reader]) / 2).sum((1, 2))
                total[writer, reader] = total.get((writer, reader), 0) + step
    return total


@pytest.mark.parametrize(
    ("method", "by_loop"), [(eap_ig, eap_ig_by_loop), (conductance, conductance_by_loop)], ids=["eap_ig", "conductance"]
)
def test_edges_are_the_sums_along_the_line(method: Any, by_loop: Any) -> None:
    model, pairs = models.build_gpt2(torch.float64), random_pairs(3)
    found, expected = score_items(Ablation(model, pairs, "edge"), method(STEPS)), by_loop(model, pairs)
    assert found.by_pair is not None and len(found.items) > 100
    for i, (source, target) in enumerate(found.items.frame[["source", "target"]].itertuples(index=False)):
        np.testing.assert_allclose(found.by_pair[:, i], expected[source, target].numpy(), rtol=1e-9, atol=1e-11)
    assert np.median(np.abs(found.signed)) > 1e-4


@pytest.mark.parametrize(
    "build", [models.build_gpt2, models.build_llama, models.build_neox, models.build_gemma2], ids=["gpt2", "llama", "neox", "gemma2"]
)
def test_conductance_of_edges_adds_up_to_that_of_nodes(build: Any) -> None:
    model, pairs = build(dtype=torch.float64), random_pairs(3)
    with no_upcasts():
        nodes, edges = (score_items(Ablation(model, pairs, level), conductance(STEPS)) for level in ("node", "edge"))
        components = conductance(STEPS)(model, pairs, ["resid", "heads"])
    sums = edges.items.frame.assign(score=edges.signed).groupby("source")["score"].sum()
    np.testing.assert_allclose(sums[nodes.items.frame["node"]], nodes.signed, atol=1e-10)
    by_name = dict(zip(nodes.items.frame["node"], nodes.signed, strict=True))
    assert by_name["embed"] == pytest.approx(float(components["resid"][:, 0].sum(1).mean()), abs=1e-10) != 0
    if build is not models.build_gemma2:  # there a head's share of what the post-norm writes is no product of its own z
        assert by_name["L1H2"] == pytest.approx(float(components["heads"][:, 1, 2].mean()), abs=1e-10) != 0


def test_circuits_of_edges_by_conductance(gpt2: TransformerBridge) -> None:
    ablation = Ablation(gpt2, random_pairs(3), "edge")
    scores = score_items(ablation, conductance(4), run="mean")
    assert len(top(scores, 20)) == 20 and scores.method == "conductance (4 steps)"
    assert torch.isfinite(ablation(torch.from_numpy(top(scores, 20).kept)[None])).all()


def test_one_method_scores_both_ways(gpt2: TransformerBridge) -> None:
    """The line is the same from either end: conductance turned round is its own negative."""
    ablation = Ablation(gpt2, random_pairs(3), "edge")
    corrupt, clean = (score_items(ablation, estimator(conductance(4)), run=run) for run in ("corrupt", "clean"))
    assert np.abs(corrupt.signed).max() > 1e-2
    np.testing.assert_allclose(corrupt.signed, clean.signed, atol=1e-4 * float(np.abs(corrupt.signed).max()))
