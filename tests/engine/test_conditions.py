"""Conditional relevance: flow through chosen units, and relevance from a latent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens_relevance import RelevanceError, latent, logit_diff, propagate
from tests.engine.families import build, close, exact, inputs_and_reference, reference_for

TARGET = logit_diff(7, 11)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel"])
@pytest.mark.parametrize("rules", ["attnlrp", "deeplift"])
def test_a_partition_of_positions_of_a_whole_cut_gives_back_the_unrestricted_relevance(family: str, rules: str) -> None:
    model, (tokens, other) = build(family), inputs_and_reference()
    with exact(family):
        options = dict(rules=rules, reference=reference_for(rules, other), names_filter="embed.hook_out")
        whole = propagate(model, tokens, TARGET, **options)
        parts = [
            propagate(model, tokens, TARGET, through={"blocks.1.hook_resid_pre": {"position": part}}, **options)["embed.hook_out"]
            for part in ([0, 1, 2], [3, 4], [5])
        ]
    close(sum(parts[1:], parts[0]), whole["embed.hook_out"], 1e-10)
    assert all(float(part.abs().sum()) > 0 for part in parts)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_partition_of_heads_gives_back_what_passes_the_layer(family: str) -> None:
    model, (tokens, _) = build(family), inputs_and_reference()
    name = "blocks.1.attn.hook_z"
    with exact(family):
        parts = [propagate(model, tokens, TARGET, rules="attnlrp", through={name: {"head": [h]}}).tokens() for h in range(4)]
        together = propagate(model, tokens, TARGET, rules="attnlrp", through={name: {"head": range(4)}}).tokens()
        whole = propagate(model, tokens, TARGET, rules="attnlrp").tokens()
    close(sum(parts[1:], parts[0]), together, 1e-10)
    assert not torch.allclose(together, whole)  # what flows around the heads is left out


def test_what_passes_a_head_is_the_relevance_that_the_head_has() -> None:
    """cp_lrp conserves, biases aside: without them, what flows through one head down to the tokens is the head's own relevance."""
    from tests.engine.families import zero_all_that_keeps

    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    zero_all_that_keeps(model)
    whole = propagate(model, tokens, TARGET, rules="cp_lrp")
    part = propagate(model, tokens, TARGET, rules="cp_lrp", through={"blocks.1.attn.hook_z": {"head": [2]}})
    close(part.tokens().sum(1), whole.heads()[:, :, 1, 2].sum(1), 1e-10)


def test_units_of_several_axes_have_to_hold_together() -> None:
    model, (tokens, _), z = build("gpt2"), inputs_and_reference(), "blocks.0.attn.o.hook_in"
    free = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=[z, "embed.hook_out"])
    for units in ({"head": [1], "position": [2, 3]}, {"position": [2, 3], "head": [1]}):
        through = propagate(model, tokens, TARGET, rules="attnlrp", names_filter=[z, "embed.hook_out"], through={z: units})
        expected = torch.zeros_like(free[z])
        expected[:, 2:4, 1] = free[z][:, 2:4, 1]
        close(through[z], expected, 1e-12)


def test_conditions_on_two_layers_are_passed_one_after_the_other() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    both = {"blocks.1.attn.hook_z": {"head": [0]}, "blocks.0.mlp.hook_post": {"unit": range(5)}}
    one = propagate(model, tokens, TARGET, rules="relp", through=both)
    other = propagate(model, tokens, TARGET, rules="relp", through=dict(reversed(both.items())))
    close(one.tokens(), other.tokens(), 1e-12)  # the order in which they are named does not matter
    neurons = propagate(model, tokens, TARGET, rules="relp", through={"blocks.1.attn.hook_z": {"head": [0]}}).neurons(0)
    close(one.neurons(0)[..., :5], neurons[..., :5], 1e-12)
    assert float(one.neurons(0)[..., 5:].abs().max()) == 0


@pytest.mark.parametrize(
    ("through", "said"),
    [
        ({"blocks.1.attn.hook_z": {"head": [9]}}, "out of range"),
        ({"blocks.1.hook_resid_pre": {"head": [0]}}, "axes"),
        ({"blocks.1.attn.hook_z": [0]}, "by axis"),
        ({"blocks.7.attn.hook_z": {"head": [0]}}, "unknown HookPoint"),
    ],
)
def test_bad_conditions_are_refused(through: dict[str, object], said: str) -> None:
    with pytest.raises(RelevanceError, match=said):
        propagate(build("gpt2"), inputs_and_reference()[0], TARGET, rules="attnlrp", through=through)  # type: ignore[arg-type]


def test_a_latent_target_is_the_gradient_of_that_unit() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    cache = propagate(model, tokens, latent("blocks.1.mlp.hook_post", unit=3, position=2), rules="gradient")
    _, activations = model.run_with_cache(tokens)
    close(cache.value, activations["blocks.1.mlp.hook_post"][:, 2, 3], 1e-12)
    embedding = cache.activations["embed.hook_out"].clone().requires_grad_(True)

    def start(x: torch.Tensor, hook: object) -> torch.Tensor:
        return embedding

    kept: list[torch.Tensor] = []
    hooks = [("embed.hook_out", start), ("blocks.1.mlp.out.hook_in", lambda x, hook: kept.append(x))]
    model.run_with_hooks(tokens, fwd_hooks=hooks)
    (gradient,) = torch.autograd.grad(kept[0][:, 2, 3].sum(), embedding)
    close(cache.coefficients["embed.hook_out"], gradient, 1e-10)
    assert float(cache.tokens()[:, 3:].abs().max()) == 0  # a causal model: nothing comes from later tokens


def test_latents_of_a_head_and_along_a_direction_are_complete_between_two_runs() -> None:
    model, (tokens, other) = build("gpt2"), inputs_and_reference()
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64)
    for target in (latent("blocks.1.attn.hook_z", unit=1, head=2), latent("blocks.1.hook_resid_pre", direction=direction)):
        cache = propagate(model, tokens, target, rules="deeplift", reference=other)
        assert cache.reference_value is not None
        gap = cache.value - cache.reference_value
        close(cache.tokens().sum(1) + cache.positions().sum(1), gap, 1e-10)


def test_heads_and_units_of_a_latent_count_from_the_end_too() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    z = propagate(model, tokens, TARGET, names_filter="blocks.1.attn.hook_z").activations["blocks.1.attn.hook_z"][:, -1]
    assert len(z[0].unique()) == 16
    for head, unit in ((-1, 2), (-4, -1), (3, -4), (-2, 0)):
        target = latent("blocks.1.attn.hook_z", unit=unit, head=head)
        close(propagate(model, tokens, target, rules="gradient").value, z[:, head, unit], 1e-12)
    direction = torch.linspace(-3, 1, 4, dtype=torch.float64)
    of_head = latent("blocks.1.attn.hook_z", head=-1, direction=direction)
    close(propagate(model, tokens, of_head, rules="gradient").value, z[:, 3] @ direction, 1e-12)
    for bad in (dict(head=-5, unit=0), dict(head=0, unit=-5), dict(head=4, unit=0), dict(head=0, unit=4)):
        with pytest.raises(RelevanceError):
            propagate(model, tokens, latent("blocks.1.attn.hook_z", **bad), rules="gradient")


def test_bad_latents_are_refused() -> None:
    model, (tokens, _) = build("gpt2"), inputs_and_reference()
    for target in (
        latent("blocks.1.mlp.hook_post", unit=500),
        latent("blocks.1.mlp.hook_post"),
        latent("blocks.1.attn.hook_z", unit=0, head=8),
        latent("blocks.1.hook_resid_pre", direction=torch.ones(3)),
        latent("no.such.point", unit=0),
    ):
        with pytest.raises(RelevanceError):
            propagate(model, tokens, target, rules="attnlrp")


@pytest.mark.parametrize("point", ["q_norm.hook_out", "hook_pattern"])
def test_heads_that_come_before_the_positions(point: str) -> None:
    """Norms of queries and patterns are [batch, head, pos, ...]: a head is a head there too, and all of them make up the whole."""
    model, name = build("qwen3"), f"blocks.1.attn.{point}"
    tokens, _ = inputs_and_reference()

    def through(**units: list[int]) -> Tensor:
        return propagate(model, tokens, TARGET, rules="attnlrp", through={name: units}, names_filter=[name]).coefficients[name]

    one, everything = through(head=[3]), sum((through(head=[h]) for h in range(1, 4)), through(head=[0]))
    assert float(one[:, :3].abs().max()) == 0 and float(one[:, 3].abs().max()) > 0
    at_last = through(position=[5])
    assert float(at_last[:, :, :5].abs().max()) == 0
    close(everything, through(head=[0, 1, 2, 3]), 1e-12)
    with pytest.raises(RelevanceError, match="head .4. is out of range"):
        through(head=[4])
