"""attach composes with TransformerLens's own gradient tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

from lens_relevance import RelevanceError, attach, logit_diff, propagate
from tests.engine.families import FAMILIES, RULESETS, TARGET, build, close, exact, inputs_and_reference, reference_for
from tests.models import build_gpt2

CORRUPT, CLEAN = inputs_and_reference()
POINTS = {"embed": "embed.hook_out", "attn_head_out": "blocks.{}.attn.hook_z", "mlp_out": "blocks.{}.hook_mlp_out"}


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 11]).sum()


@pytest.mark.parametrize("rules", RULESETS)
@pytest.mark.parametrize("family", ["gpt2", "neox_sequential", "native_layer_norm"])
def test_attribution_patch_gives_the_numbers_of_propagate(family: str, rules: str) -> None:
    model = build(family)
    clean, corrupt = CLEAN[:1], CORRUPT[:1]
    with attach(model, rules, reference=reference_for(rules, clean)):
        scores = attribution_patch(model, clean, corrupt, metric).node_scores
    names = ["embed.hook_out", *(POINTS[kind].format(i) for kind in ("attn_head_out", "mlp_out") for i in (0, 1))]
    cache = propagate(model, corrupt, logit_diff(7, 11), rules=rules, reference=clean, names_filter=names)
    compared = 0
    for node, score in scores.items():
        relevance = -cache[POINTS[node.kind].format(node.layer)][0, node.position]
        mine = float((relevance if node.head is None else relevance[node.head]).sum())
        assert score == pytest.approx(mine, rel=1e-9, abs=1e-12), node
        compared += abs(mine) > 1e-6
    assert compared > 20


def test_attribution_patch_of_a_batch_without_a_reference() -> None:
    model = build("gpt2")
    with attach(model, "relp"):
        scores = attribution_patch(model, CLEAN, CORRUPT, metric).node_scores
    cache = propagate(model, CORRUPT, logit_diff(7, 11), rules="relp", reference=CLEAN)
    mine = -cache["blocks.1.attn.hook_z"].sum(-1).mean(0)
    assert {n: s for n, s in scores.items() if n.kind == "attn_head_out" and n.layer == 1} == pytest.approx(
        {n: float(mine[n.position, n.head]) for n in scores if n.kind == "attn_head_out" and n.layer == 1}, rel=1e-9
    )


@pytest.mark.parametrize("rules", RULESETS)
def test_run_with_cache_gives_the_coefficients_of_the_loss(rules: str) -> None:
    model = build("gpt2")
    names = ["embed.hook_out", "blocks.0.hook_in", "blocks.0.attn.o.hook_in", "blocks.1.mlp.out.hook_in"]

    def loss(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), CORRUPT[:, 1:].flatten())

    reference = reference_for(rules, CLEAN)
    logits = model(CORRUPT).detach().requires_grad_(True)
    (start,) = torch.autograd.grad(loss(logits), logits)  # the tool starts from the loss's plain gradient, whatever the rules
    with attach(model, rules, reference=reference):
        _, cache = model.run_with_cache(CORRUPT, return_type="loss", incl_bwd=True, names_filter=lambda name: name in names)
    mine = propagate(model, CORRUPT, lambda logits: (logits * start).sum((1, 2)), rules=rules, names_filter=names, reference=reference)
    for name in names:
        got = cache[f"{name}_grad"]
        close(got.reshape(mine.coefficients[name].shape), mine.coefficients[name], 1e-9)


def every_gradient(model: TransformerBridge, around: Callable[[Callable[[], None]], None]) -> dict[str, Tensor]:
    """Gradients that TransformerLens's backward hooks see of the target, at every HookPoint; `around` says when they are hung."""
    seen: dict[str, Tensor] = {}
    handles: list[Any] = []

    def hang() -> None:
        for point in {id(p): p for p in model.hook_dict.values()}.values():

            def keep(gradient: Tensor, hook: Any) -> None:
                seen[hook.name] = gradient.detach().clone()

            handles.append((point, point.add_hook(keep, dir="bwd")))

    around(hang)
    for point, handle in handles:
        handle.hook.remove()
        point.bwd_hooks.remove(handle)
    return seen


def backward(model: TransformerBridge, tokens: Tensor = CORRUPT) -> None:
    metric(model(tokens)).backward()
    for parameter in model.original_model.parameters():
        parameter.grad = None


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_hooks_see_the_right_coefficient_everywhere(family: str) -> None:
    """Every HookPoint that has a gradient without rules has one with them, and it is propagate's; hung before the rules and after."""
    with exact(family):
        _backward_hooks(build(family))


def _backward_hooks(model: TransformerBridge) -> None:
    def plain(hang: Callable[[], None]) -> None:
        hang()
        backward(model)

    without = every_gradient(model, plain)
    assert len(without) > 30
    for rules in ("attnlrp", "deeplift"):
        mine = propagate(model, CORRUPT, TARGET, rules=rules, reference=reference_for(rules, CLEAN), names_filter=lambda name: True)
        for when in ("before", "after"):

            def ruled(hang: Callable[[], None], rules: str = rules, when: str = when) -> None:
                if when == "before":
                    hang()
                with attach(model, rules, reference=reference_for(rules, CLEAN)):
                    if when == "after":
                        hang()
                    backward(model)

            seen = every_gradient(model, ruled)
            assert set(without) <= set(seen), sorted(set(without) - set(seen))
            compared = 0
            for name, gradient in seen.items():
                if name not in mine:
                    assert name.endswith(("hook_scale", "hook_normalized", "hook_cos", "hook_sin")), (name, mine.absent.get(name))
                    continue
                expected = mine.coefficients[name]
                size = max(float(expected.abs().max()), 1e-6)
                worst = float((gradient.reshape(expected.shape) - expected).abs().max())
                assert worst <= 1e-9 * size, (name, rules, when, worst)
                compared += size > 1e-6
            assert compared > 30


@pytest.mark.parametrize("rules", ["relp", "deeplift"])
@pytest.mark.parametrize("family", ["gpt2", "native_layer_norm"])
def test_edges_of_attribution_patch_are_refused(family: str, rules: str) -> None:
    """They use split-qkv, where the bridge runs the raw norm once per head, past any rule."""
    model = build(family, torch.float32)
    flags = {f: getattr(model.cfg, f, None) for f in ("use_split_qkv_input", "use_attn_in", "use_attn_result")}
    expected: tuple[type[Exception], ...] = (RelevanceError,) if family == "gpt2" else (RelevanceError, NotImplementedError, ValueError)
    with pytest.raises(expected) as caught, attach(model, rules, reference=reference_for(rules, CLEAN[:1])):
        attribution_patch(model, CLEAN[:1], CORRUPT[:1], metric, EdgeAttributionConfig(granularity="edge"))
    if family == "gpt2":
        assert "split_qkv" in str(caught.value) and "set_use_split_qkv_input(False)" in str(caught.value)
    assert {f: getattr(model.cfg, f, None) for f in flags} == flags


def test_split_qkv_and_attn_in_are_refused() -> None:
    for flag in ("use_split_qkv_input", "use_attn_in"):
        model = build_gpt2()
        getattr(model, f"set_{flag}")(True)
        with pytest.raises(RelevanceError, match=flag):
            propagate(model, CORRUPT, TARGET)


def test_per_head_results_are_read_where_asked_for() -> None:
    model = build("gpt2")
    model.set_use_attn_result(True)
    names = ["blocks.0.attn.hook_result", "blocks.0.attn.o.hook_in"]
    cache = propagate(model, CORRUPT, TARGET, names_filter=names)
    close(cache[names[0]].sum(-1), cache[names[1]].sum(-1), 1e-9)


def test_rules_are_attached_once_at_a_time() -> None:
    model = build_gpt2()
    with attach(model, "attnlrp"):
        with pytest.raises(RelevanceError, match="already carries rules"), attach(model, "relp"):
            pass
        assert model(CORRUPT).requires_grad  # the outer rules are still in order
        metric(model(CORRUPT)).backward()


def test_several_forwards_and_backwards_inside() -> None:
    """Each backward is of its own forward, also when they are interleaved."""
    model = build("gpt2")
    other = CORRUPT.flip(0)
    expected = [
        propagate(model, t, TARGET, rules="attnlrp", names_filter="blocks.0.hook_in").coefficients["blocks.0.hook_in"]
        for t in (CORRUPT, other)
    ]
    got: list[Tensor] = []
    with attach(model, "attnlrp"):
        model.hook_dict["blocks.0.hook_in"].add_hook(lambda g, hook: got.append(g.clone()), dir="bwd")
        one, two = metric(model(CORRUPT)), metric(model(other))
        two.backward(retain_graph=True)
        one.backward()
        two.backward()
    for gradient, index in zip(got, (1, 0, 1), strict=True):
        close(gradient, expected[index], 1e-9)


def test_attach_leaves_requires_grad_alone() -> None:
    model = build_gpt2()
    with attach(model, "attnlrp"):
        assert all(p.requires_grad for p in model.original_model.parameters())
        metric(model(CORRUPT)).backward()
    assert any(p.grad is not None for p in model.original_model.parameters())


def test_attach_compares_each_row_with_its_reference_and_all_with_one() -> None:
    model = build("gpt2")
    names = "blocks.0.hook_in"
    for reference in (CLEAN, CLEAN[:1]):
        seen: list[Tensor] = []
        handle = model.hook_dict[names].add_hook(lambda g, hook, seen=seen: seen.append(g.clone()), dir="bwd")
        with attach(model, "deeplift", reference=reference):
            backward(model)
        handle.hook.remove()
        model.hook_dict[names].bwd_hooks.clear()
        mine = propagate(model, CORRUPT, TARGET, reference=reference.expand(2, -1).contiguous(), names_filter=names)
        close(seen[0], mine.coefficients[names], 1e-9)
