"""The comparison of a model with its sites: no false alarm on honest models, made once for each state of a model, and can be left out.

What it notices is in tests/attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformer_lens.model_bridge import TransformerBridge

from analyses.benchmarks.tiny_models import FAMILIES, MORE, VARIANTS, build
from lens_relevance import MismatchError, RelevanceError, attach, logit_diff, mean_embedding, propagate, random_tokens, zero_embedding
from lens_relevance import engine as module
from lens_relevance.coverage_table import random_inputs, target_for
from lens_relevance.engine import ForwardCheck
from lens_relevance.sites import anatomy
from tests.engine.families import RULESETS, reference_for

TOKENS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
OTHER = torch.tensor([[1, 12, 13, 14, 15], [6, 17, 18, 19, 20]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
TARGET = logit_diff(7, 11)
REFUSED = ("mamba", "qwen2_moe")


@pytest.fixture
def comparisons(monkeypatch: pytest.MonkeyPatch) -> list[ForwardCheck]:
    """The comparisons made so far."""
    made: list[ForwardCheck] = []

    class Counted(ForwardCheck):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr(module, "ForwardCheck", Counted)
    return made


@pytest.mark.parametrize("family", [family for family in FAMILIES | MORE | VARIANTS if family not in REFUSED])
def test_an_honest_model_raises_no_alarm_and_is_compared_once(family: str, comparisons: list[ForwardCheck]) -> None:
    """In float32 and half precision, one run and two, padded where the model takes text."""
    halves = [torch.bfloat16, *([torch.float16] if family in ("gpt2", "llama") else [])]
    for dtype in (torch.float32, *halves):
        comparisons.clear()
        model = build(family, dtype)
        inputs, other = (random_inputs(model, 2, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        target, mask = target_for(model), MASK if isinstance(inputs, Tensor) and inputs.ndim == 2 else None
        propagate(model, inputs, target, rules="attnlrp", attention_mask=mask)
        assert len(comparisons) == 1 and comparisons[0].has_seen_graph and len(comparisons[0].off) > 10
        if mask is not None:
            with torch.no_grad():
                model(inputs)
        propagate(model, inputs, target, rules="deeplift", reference=other, attention_mask=mask)
        assert len(comparisons) == 1


@pytest.mark.parametrize("rules", RULESETS)
def test_no_alarm_under_any_ruleset_reference_or_way_of_running(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.CHECKED, "holds", lambda *_: False)  # compared in every call
    for family in ("gpt2", "opt"):
        model, reference = build(family, torch.float32), reference_for(rules, OTHER)
        for options in (dict(audit=True), dict(recompute=True), dict(through={"blocks.0.attn.hook_z": {"head": [1]}})):
            propagate(model, TOKENS, TARGET, rules=rules, reference=reference, attention_mask=MASK, **options)
        with attach(model, rules, reference=reference):
            model(TOKENS)[:, -1, 0].sum().backward()
        if reference is not None:
            for kind in (mean_embedding(), random_tokens(2), *([zero_embedding()] if family == "opt" else [])):
                propagate(model, TOKENS, TARGET, rules=rules, reference=kind)


def _zeroed(x: Tensor, hook: Any) -> Tensor:
    return torch.cat([x[..., :1] * 0, x[..., 1:]], -1)


def _scaled(x: Tensor, hook: Any) -> Tensor:
    return 1.3 * x


def _patched(x: Tensor, hook: Any) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)


def _one_position(x: Tensor, hook: Any) -> Tensor:
    return torch.where((torch.arange(x.shape[1]) == 2).reshape(-1, *[1] * (x.ndim - 2)), 0.5 * x + 0.1, x)


@pytest.mark.parametrize("rules", ["gradient", "attnlrp", "deeplift"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_oss"])
def test_edits_by_hooks_raise_no_alarm(family: str, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.CHECKED, "holds", lambda *_: False)
    model = build(family, torch.float32)
    names = ["embed.hook_out", "blocks.0.hook_out", "blocks.1.ln1.hook_in", "blocks.1.ln1.hook_out", "blocks.1.attn.q.hook_out"]
    names += [
        "blocks.0.attn.v.hook_out",
        "blocks.1.attn.o.hook_in",
        "blocks.0.attn.hook_out",
        "blocks.1.mlp.hook_in",
        "blocks.0.mlp.hook_out",
    ]
    edits = [_zeroed, _scaled, _patched, _one_position]
    for i, name in enumerate(names[:5]):
        with model.hooks(fwd_hooks=[(name, edits[i % 4]), (names[i - 5], edits[(i + 1) % 4])]):
            propagate(model, TOKENS, target_for(model), rules=rules, reference=reference_for(rules, OTHER))


def test_sines_that_a_hook_edits_are_rotated_back() -> None:
    """Two halves of sines that differ: rotating back is no rotation by the negative angle then. deeplift adds up."""
    model = build("neox_parallel")
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_sin", _patched)]):
        account = propagate(model, TOKENS, TARGET, rules="deeplift", reference=OTHER, audit=True).conservation()
    assert float((account["unexplained"].abs() / account["value"].abs()).max()) < 1e-9
    assert float(account["value"].abs().min()) > 1e-2


def test_positions_that_a_model_holds_once_for_the_batch_are_each_examples_own() -> None:
    """Marian's are [pos, d_model] and broadcast; each example's account is that of the example by itself."""
    model = build("marian")
    inputs, other = (random_inputs(model, 2, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    together = propagate(model, inputs, TARGET, rules="deeplift", reference=other, audit=True).conservation()
    for row in range(2):
        one, two = ({name: ids[row : row + 1] for name, ids in batch.items()} for batch in (inputs, other))  # type: ignore[union-attr]
        alone = propagate(model, one, TARGET, rules="deeplift", reference=two, audit=True).conservation()
        both = together[together["example"] == row].reset_index(drop=True)
        assert float((both["relevance"] - alone["relevance"]).abs().max()) < 1e-12 < float(alone["relevance"].abs().max())
        assert float(both["unexplained"].abs().max()) < 1e-12


def _doubled(linear: nn.Module) -> None:
    linear.register_forward_hook(lambda *call: 2 * call[-1])


def test_check_false_leaves_the_comparison_out(comparisons: list[ForwardCheck]) -> None:
    model = build("gpt2")
    _doubled(model.blocks[1].mlp.out.original_component)
    for rules in ("gradient", "deeplift"):
        with pytest.raises(MismatchError, match=r"blocks.1.mlp.out does not compute what its site says.*check=False"):
            propagate(model, TOKENS, TARGET, rules=rules, reference=reference_for(rules, OTHER))
    assert len(comparisons) == 2
    propagate(model, TOKENS, TARGET, rules="gradient", check=False)
    with attach(model, "gradient", check=False):
        model(TOKENS)
    assert len(comparisons) == 2


def _other_activation(model: TransformerBridge) -> None:
    model.blocks[1].mlp.original_component.act = nn.Tanh().eval()


def _other_class(model: TransformerBridge) -> None:
    kind = type(model.blocks[1].mlp.original_component)
    model.blocks[1].mlp.original_component.__class__ = type("Other", (kind,), {})


def _parametrized(model: TransformerBridge) -> None:
    parametrizations.weight_norm(model.blocks[1].mlp.out.original_component).eval()


def _another_hook_for_one(model: TransformerBridge) -> None:
    layer = model.blocks[1].mlp.out.original_component
    layer._forward_hooks.popitem()
    layer.register_forward_hook(lambda *call: None)


def _other_setting(model: TransformerBridge) -> None:
    model.original_model.config.layer_norm_epsilon = 1e-6


@pytest.mark.parametrize("change", [_other_activation, _other_class, _parametrized, _another_hook_for_one, _other_setting])
def test_a_changed_model_is_compared_again(change: Callable[[TransformerBridge], None], comparisons: list[ForwardCheck]) -> None:
    model = build("gpt2")
    model.blocks[1].mlp.out.original_component.register_forward_hook(lambda *call: None)
    propagate(model, TOKENS, TARGET, rules="gradient")
    with model.hooks(fwd_hooks=[("blocks.0.hook_out", _scaled)]):  # between operations, so that none is another
        propagate(model, TOKENS, TARGET, rules="gradient")
    with torch.no_grad():
        model.blocks[0].mlp.out.original_component.weight.mul_(1.1)
    propagate(model, TOKENS, TARGET, rules="gradient")
    assert len(comparisons) == 1
    change(model)
    propagate(model, TOKENS, TARGET, rules="gradient")
    assert len(comparisons) == 2


@pytest.mark.parametrize("late", [False, True])
def test_edits_inside_a_mixture_of_experts_are_refused(late: bool) -> None:
    """Its HookPoints lie inside one operation, so that no rule would follow."""
    model = build("deepseek_v3", torch.float32)
    inside = [str(point.name) for point in anatomy(model).inside_experts]
    name = "blocks.1.mlp.shared_experts.in.hook_out"
    assert name in inside and "blocks.1.mlp.hook_in" not in inside
    if late:
        propagate(model, TOKENS, TARGET, rules="attnlrp")
    with model.hooks(fwd_hooks=[(name, _scaled)]), pytest.raises(RelevanceError, match="inside a mixture of experts edit is not followed"):
        propagate(model, TOKENS, TARGET, rules="attnlrp")
    with model.hooks(fwd_hooks=[(name, lambda x, hook: None)]):  # one that reads is no harm
        propagate(model, TOKENS, TARGET, rules="attnlrp")


def test_values_that_are_not_finite_are_named_as_such() -> None:
    """By the check of the target, which says where they begin, not as a component that computes something else."""
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.blocks[0].attn.q.original_component.weight[0, 0] = float("nan")
    with pytest.raises(RelevanceError, match="the target is nan") as refusal:
        propagate(model, TOKENS, TARGET, rules="attnlrp")
    assert not isinstance(refusal.value, MismatchError)
